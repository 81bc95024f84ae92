"""What a call launches on a GPU, counted by running it: Triton kernels and torch operations alike.

On a GPU the profiler tells. Elsewhere the call runs on the triton backend in the interpreter, under a dispatch mode
that sees each torch operation; views and allocations are free, and what the interpreter itself does is not counted. As
Triton decides at import whether kernels are interpreted, `bench layer` asks a process of its own (`main` below).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from crossdock.errors import CrossdockError

FREE = ("empty", "empty_like", "new_empty", "empty_strided", "detach")
SMALL_LAYER = {"hidden_size": 256, "expert_size": 128, "num_experts": 16, "top_k": 4}
SMALL_DECODER = {  # a DeepSeek-V3 config.json, every part of it there
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "q_lora_rank": 128,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 128, "num_attention_heads": 2,
    "moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "num_hidden_layers": 1, "max_position_embeddings": 64,
}  # fmt: skip
ATTENTION_CORE = ("absorb_queries_kernel", "attend_latents_kernel", "expand_values_kernel")


@contextmanager
def record_launches(device: torch.device) -> Iterator[list[str]]:
    """`with record_launches(device) as names:` gives, at its end, the kernels that its body launches, in order."""
    names: list[str] = []
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield names
            torch.cuda.synchronize(device)
        events: Any = profile.events()
        names += [event.name for event in events if event.device_type.name == "CUDA"]
    else:
        with _interpreted_kernels(names), _Recorder(names):
            yield names


@contextmanager
def _interpreted_kernels(names: list[str]) -> Iterator[None]:
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    launch = GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)
        with _disable_current_modes():
            launch(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", recorded):
        yield


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operators that compute."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func._schema.name.removeprefix("aten::")
        if not is_view and name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def decoder_launches(kind: str, device: torch.device) -> list[str]:
    """What a DeepSeek layer with experts launches outside attention's core for a step of decoding, in bfloat16.

    The rank is alone. `kind` is how all weights are held: "none" or "fp8_block".
    """
    from crossdock.comm import LocalTransport
    from crossdock.gemm import QuantSpec
    from crossdock.models.blocks import Rotary
    from crossdock.models.cache import PagedCache, Sequence
    from crossdock.models.deepseek import DeepSeekConfig
    from crossdock.models.deepseek.model import DecoderLayer

    dtype, quant = torch.bfloat16, QuantSpec(kind)  # type: ignore[arg-type]
    config = DeepSeekConfig.from_hf(SMALL_DECODER, quant, quant)
    decoder = DecoderLayer(config, 0, LocalTransport(), dtype, device, backend="triton").requires_grad_(False)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cache = PagedCache(1, config.kv_lora_rank + config.qk_rope_head_dim, 4, 16, dtype, device)
    batch = cache.batch([(Sequence(length=5), 1, True), (Sequence(length=9), 1, True)])
    x_TD = torch.randn(2, config.hidden_size, device=device).to(dtype)
    step = x_TD, x_TD, Rotary(config.rope, device)(batch.positions_T), batch, cache
    with torch.inference_mode():
        decoder(*step)
        with record_launches(device) as names:
            decoder(*step)
    return [name for name in names if name not in ATTENTION_CORE]


def interpreted_launches(kinds: tuple[str, ...] = ("none", "fp8_block")) -> dict[str, list[str]]:
    """What the routed path of an MoE layer launches for each kind of experts, in bfloat16, in a process of its own.

    And, as "decoder KIND", what `decoder_launches` gives. Raises CrossdockError with that process's last line where it
    fails.
    """
    command = [sys.executable, "-m", "crossdock.cli.bench.launches", *kinds]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CrossdockError(f"counting launches ended with exit code {done.returncode}: {last}")
    counted: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return counted


def main() -> None:
    """Prints one JSON object: for each kind of weights on the command line, what `interpreted_launches` says of it."""
    from crossdock.comm import LocalTransport
    from crossdock.gemm import QuantSpec
    from crossdock.moe import MoEConfig, MoELayer

    counted: dict[str, list[str]] = {}
    for kind in sys.argv[1:]:
        counted[f"decoder {kind}"] = decoder_launches(kind, torch.device("cpu"))
        config = MoEConfig(**SMALL_LAYER, quant=QuantSpec(kind))  # type: ignore[arg-type]
        layer = MoELayer(config, LocalTransport(), backend="triton")
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x_TD = torch.randn(8, config.hidden_size).to(torch.bfloat16)
        with torch.inference_mode():
            layer(x_TD)
            with record_launches(x_TD.device) as counted[kind]:
                layer(x_TD)
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
