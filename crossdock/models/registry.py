"""From a checkpoint directory to a model: which family its `config.json` names, and its tensors on this rank."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crossdock.backend import Backend, resolve_backend
from crossdock.comm.transport import Transport
from crossdock.errors import CheckpointError, ConfigError
from crossdock.gemm import BLOCK, QuantSpec
from crossdock.models.blocks import pack_weights
from crossdock.models.deepseek import DeepSeekConfig, DeepSeekModel
from crossdock.models.deepseek.config import MODEL_TYPES as DEEPSEEK_TYPES
from crossdock.models.deepseek.names import targets as deepseek_targets
from crossdock.models.fields import Fields
from crossdock.models.loader import Checkpoint, LoadReport, load_into, read_config
from crossdock.models.qwen_moe import QwenMoEConfig, QwenMoEModel
from crossdock.models.qwen_moe.config import MODEL_TYPES as QWEN_TYPES
from crossdock.models.qwen_moe.names import targets as qwen_targets
from crossdock.moe import ExchangeConfig
from crossdock.moe.config import FLAT

FAMILIES = (*DEEPSEEK_TYPES, *QWEN_TYPES)
DENSE = re.compile(r"\.self_attn\.(q|q_a|q_b|kv_a|o)_proj(_with_mqa)?\.weight$|\.mlp\.(gate|up|down)_proj\.weight$")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A model on this rank, what loading it took, and the ids that end a text."""

    model: DeepSeekModel | QwenMoEModel
    report: LoadReport
    stop_ids: frozenset[int]


def checkpoint_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype a checkpoint names for its activations (`dtype` or `torch_dtype`), bfloat16 where it names none.

    Raises ConfigError for a dtype other than float32, float16 and bfloat16.
    """
    names = (*DTYPES, *(f"torch.{name}" for name in DTYPES))
    name = Fields(config).choice("dtype", "torch_dtype", among=names, default="bfloat16")
    return DTYPES[name.removeprefix("torch.")]


def load_model(
    directory: str | Path,
    transport: Transport,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
    exchange: ExchangeConfig = FLAT,
    two_batch: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Loaded:
    """Reads a Hugging Face directory into the model its config names; each rank reads its own experts only.

    On the torch backend, FP8-block weights are multiplied out to `dtype` while they are read; on the triton backend
    they stay FP8 and are multiplied in FP8, unless float32 was asked for: experts, and in DeepSeek models dense weights
    too, where the checkpoint holds all of those in FP8. `exchange` says how rows travel; with `two_batch` the attention
    of one half of a batch runs while the other half's rows do. `progress(done, total)` counts bytes. Raises
    CheckpointError where the directory, a tensor or the model type is not what it should be, ConfigError for a config
    field that cannot work, and for experts that do not divide over the ranks.
    """
    config, device = read_config(directory), torch.device(device)
    dtype = dtype or checkpoint_dtype(config)
    stored = stored_as(config)
    if resolve_backend(backend, device) == "torch" or dtype == torch.float32:
        stored = QuantSpec()
    stop_ids = frozenset(Fields(config).integers("eos_token_id"))
    settings = _settings(config, stored, directory)
    checkpoint = Checkpoint(directory)
    model: DeepSeekModel | QwenMoEModel
    options: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend}
    options |= {"exchange": exchange, "two_batch": two_batch}
    if isinstance(settings, DeepSeekConfig):
        if f"model.layers.{settings.num_hidden_layers}.eh_proj.weight" not in checkpoint.file_of:
            settings = replace(settings, num_nextn_predict_layers=0)  # many checkpoints leave the MTP layer out
        if has_dense_fp8(checkpoint.file_of):
            settings = replace(settings, dense=stored)
        model = DeepSeekModel(settings, transport, **options)
        targets = deepseek_targets(model)
    else:
        model = QwenMoEModel(settings, transport, **options)
        targets = qwen_targets(model)
    report = load_into(checkpoint, targets, progress)
    model.requires_grad_(False)
    pack_weights(model)
    return Loaded(model, report, stop_ids)


def stored_as(config: dict[str, Any]) -> QuantSpec:
    """How a checkpoint's experts are stored, by its `quantization_config`: as they are, or FP8 in blocks.

    Raises ConfigError for another quantisation than FP8 in blocks of 128x128.
    """
    if not Fields(config).has("quantization_config"):
        return QuantSpec()
    fields = Fields(config).section("quantization_config")
    fields.choice("quant_method", among=("fp8",))
    if fields.integers("weight_block_size") not in ((), (BLOCK, BLOCK)):
        found = config["quantization_config"]["weight_block_size"]
        raise ConfigError(f"config.json: quantization_config.weight_block_size must be {[BLOCK, BLOCK]}, found {found}")
    pow2 = fields.has("scale_fmt") and fields.choice("scale_fmt", among=("ue8m0",)) == "ue8m0"
    return QuantSpec("fp8_block", pow2_scales=pow2)


def has_dense_fp8(names: Collection[str]) -> bool:
    """Whether all dense weights that a DeepSeek model multiplies in FP8 have scales beside them."""
    dense = {name for name in names if DENSE.search(name)}
    return bool(dense) and all(f"{name}_scale_inv" in names for name in dense)


def _settings(config: dict[str, Any], quant: QuantSpec, directory: str | Path) -> DeepSeekConfig | QwenMoEConfig:
    family = config.get("model_type")
    if family in DEEPSEEK_TYPES:
        return DeepSeekConfig.from_hf(config, quant)
    if family in QWEN_TYPES:
        return QwenMoEConfig.from_hf(config, quant)
    raise CheckpointError(f"{directory}/config.json: model_type must be one of {FAMILIES}, found {family!r}")
