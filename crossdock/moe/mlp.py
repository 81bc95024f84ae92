"""A SwiGLU MLP that every rank holds whole: shared experts here, dense layers in the models.

On the triton backend it is a group of one of the experts' products: two launches, and the bits that it would have among
the routed experts, where a rank that is alone puts it (`crossdock.moe.fused`).

Legend: T tokens, D hidden, F inner size.
"""

import torch
from torch import Tensor, nn

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm import BLOCK, QuantSpec, Rows, dense_gemm, dense_swiglu, dense_swiglu_fp8, linear_fp8
from crossdock.linear import linear, pack
from crossdock.moe.config import MoEConfig


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one weight [2F, D] (gate rows first)."""

    def __init__(
        self, hidden_size: int, inner_size: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.gate_up = nn.Parameter(torch.zeros(2 * inner_size, hidden_size, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.zeros(hidden_size, inner_size, dtype=dtype, device=device))

    def pack(self) -> None:
        """Lays the weights out for inference on this device once and for all; the bits stay the same."""
        if resolve_backend(self.backend, self.down.device) == "triton":
            return
        for name in ("gate_up", "down"):
            setattr(self, name, nn.Parameter(pack(getattr(self, name).data), requires_grad=False))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return dense_gemm(dense_swiglu(x_TD, self.gate_up, self.backend), self.down, self.backend)


class GatedMLP(SwigluMLP):
    """The same times sigmoid(x . gate) per token: Qwen2-MoE's shared expert (`shared_expert_gate`)."""

    def __init__(
        self, hidden_size: int, inner_size: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
    ) -> None:
        super().__init__(hidden_size, inner_size, dtype, device, backend)
        self.gate = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=device))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        gate_T1 = torch.sigmoid(linear(x_TD, self.gate).double())  # by float64: see crossdock.linear
        return gate_T1.to(x_TD.dtype) * super().forward(x_TD)


class Fp8MLP(nn.Module):
    """The same as `SwigluMLP` with e4m3 weights in 128x128 blocks, multiplied in FP8.

    For inference only: weights and their fp32 scales are buffers. Rows may come quantised. Raises ConfigError where
    gate and up would share a block.
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        quant: QuantSpec,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if inner_size % BLOCK:
            raise ConfigError(f"an FP8 MLP needs an inner size in whole blocks of {BLOCK}, found {inner_size}")
        self.backend: Backend = backend
        self.dtype, self.pow2 = dtype, quant.pow2_scales
        for name, rows, cols in (("gate_up", 2 * inner_size, hidden_size), ("down", hidden_size, inner_size)):
            self.register_buffer(name, torch.zeros(rows, cols, dtype=torch.float8_e4m3fn, device=device))
            shape = -(-rows // BLOCK), -(-cols // BLOCK)
            self.register_buffer(f"{name}_scale", torch.ones(shape, dtype=torch.float32, device=device))

    def forward(self, x: Rows) -> Tensor:
        """[T, D], or codes and scales of that -> [T, D] in the model's dtype."""
        dtype, pow2, backend = self.dtype, self.pow2, self.backend
        hidden = dense_swiglu_fp8(x, self.gate_up, self.gate_up_scale, pow2=pow2, out_dtype=dtype, backend=backend)
        return linear_fp8(hidden, self.down, self.down_scale, out_dtype=dtype, backend=backend)


def make_mlp(
    hidden_size: int,
    inner_size: int,
    quant: QuantSpec,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend = "auto",
) -> SwigluMLP | Fp8MLP:
    """An MLP held as `quant` asks for, as far as it can be: in FP8 by block where gate and up share none."""
    if quant.kind == "fp8_block" and inner_size % BLOCK == 0:
        return Fp8MLP(hidden_size, inner_size, quant, dtype, device, backend)
    return SwigluMLP(hidden_size, inner_size, dtype, device, backend)


def make_shared_experts(
    config: MoEConfig, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
) -> SwigluMLP | Fp8MLP | None:
    """A layer's shared expert, held as the routed ones are; one with a gate is never quantised."""
    sizes = config.hidden_size, config.shared_size
    if not config.shared_size:
        return None
    if config.shared_gate:
        return GatedMLP(*sizes, dtype, device, backend)
    return make_mlp(*sizes, config.quant, dtype, device, backend)
