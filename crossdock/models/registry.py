"""From a checkpoint directory to a model: which family its `config.json` names, and its tensors on this rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crossdock.comm.transport import Transport
from crossdock.errors import CheckpointError
from crossdock.gemm import QuantSpec
from crossdock.models.deepseek import DeepSeekConfig, DeepSeekModel
from crossdock.models.deepseek.names import targets as deepseek_targets
from crossdock.models.loader import Checkpoint, LoadReport, load_into, read_config
from crossdock.models.qwen_moe import QwenMoEConfig, QwenMoEModel
from crossdock.models.qwen_moe.names import targets as qwen_targets

FAMILIES = ("deepseek_v3", "qwen3_moe", "qwen2_moe")


@dataclass(frozen=True)
class Loaded:
    """A model on this rank, what loading it took, and the ids that end a text."""

    model: DeepSeekModel | QwenMoEModel
    report: LoadReport
    stop_ids: frozenset[int]


def checkpoint_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype a checkpoint names for its activations (`dtype` or `torch_dtype`), bfloat16 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


def load_model(
    directory: str | Path,
    transport: Transport,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Loaded:
    """Reads a Hugging Face directory into the model its config names; each rank reads its own experts only.

    On a CPU, FP8-block experts are dequantised to `dtype` while they are read; on a GPU they stay FP8 and are
    multiplied in FP8, unless float32 was asked for. `progress(done, total)` counts bytes. Raises CheckpointError where
    the directory, a tensor or the model type is not what it should be, ConfigError for a config field that cannot work.
    """
    config, device = read_config(directory), torch.device(device)
    dtype = dtype or checkpoint_dtype(config)
    quantized = (config.get("quantization_config") or {}).get("quant_method") == "fp8"
    keep_fp8 = device.type == "cuda" and quantized and dtype != torch.float32
    settings = _settings(config, QuantSpec("fp8_block") if keep_fp8 else QuantSpec(), directory)
    checkpoint = Checkpoint(directory)
    model: DeepSeekModel | QwenMoEModel
    if isinstance(settings, DeepSeekConfig):
        if f"model.layers.{settings.num_hidden_layers}.eh_proj.weight" not in checkpoint.file_of:
            settings = replace(settings, num_nextn_predict_layers=0)  # many checkpoints leave the MTP layer out
        model = DeepSeekModel(settings, transport, dtype=dtype, device=device)
        targets = deepseek_targets(model)
    else:
        model = QwenMoEModel(settings, transport, dtype=dtype, device=device)
        targets = qwen_targets(model)
    report = load_into(checkpoint, targets, progress)
    model.requires_grad_(False)
    ends = config.get("eos_token_id")
    stop_ids = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return Loaded(model, report, stop_ids)


def _settings(config: dict[str, Any], quant: QuantSpec, directory: str | Path) -> DeepSeekConfig | QwenMoEConfig:
    family = config.get("model_type")
    try:
        if family == "deepseek_v3":
            return DeepSeekConfig.from_hf(config, quant)
        if family in ("qwen3_moe", "qwen2_moe"):
            return QwenMoEConfig.from_hf(config, quant)
    except TypeError as error:
        raise CheckpointError(f"{directory}/config.json: a field has a value of the wrong type: {error}") from error
    raise CheckpointError(f"{directory}/config.json: model_type must be one of {FAMILIES}, found {family!r}")
