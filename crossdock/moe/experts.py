"""The experts that live on one rank: gate-up GEMM, SwiGLU, down GEMM over ragged groups of rows.

Legend: L slots on this rank, D hidden, F inner size, R rows received.

Weights stand as gate_up [L, 2F, D] (gate rows first) and down [L, D, F], the order in which a fused Hugging Face
checkpoint stores them; a slot that holds no expert (placement padding) is zeros and receives no rows.
"""

import torch
from torch import Tensor, nn

from crossdock.backend import Backend
from crossdock.comm import Inbound
from crossdock.errors import ConfigError
from crossdock.gemm import BLOCK, grouped_gemm, grouped_gemm_fp8, quantize_rows, swiglu, swiglu_quantize
from crossdock.moe.config import MoEConfig


class Experts(nn.Module):
    """Parameters of L experts in `dtype`, trainable. Raises ConfigError where `quant` asks for another form."""

    def __init__(
        self, config: MoEConfig, num_slots: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        size_D, size_F = config.hidden_size, config.expert_size
        self.gate_up = nn.Parameter(torch.zeros(num_slots, 2 * size_F, size_D, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.zeros(num_slots, size_D, size_F, dtype=dtype, device=device))

    def forward(self, inbound: Inbound) -> Tensor:
        """Rows [R, D] in expert-major order -> rows [R, D] in the same order."""
        gate_up_R2F = grouped_gemm(inbound.rows_RD, self.gate_up, inbound.ends_L, backend=self.backend)
        return grouped_gemm(swiglu(gate_up_R2F, backend=self.backend), self.down, inbound.ends_L, backend=self.backend)


class Fp8Experts(nn.Module):
    """The same with e4m3 weights in 128x128 blocks, multiplied in FP8 with activations quantised per 1x128.

    For inference only: weights and their fp32 scales are buffers.
    """

    def __init__(
        self, config: MoEConfig, num_slots: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.pow2 = config.quant.pow2_scales
        size_D, size_F = config.hidden_size, config.expert_size
        self.gate_up: Tensor
        self.gate_up_scale: Tensor
        self.down: Tensor
        self.down_scale: Tensor
        for name, rows, cols in (("gate_up", 2 * size_F, size_D), ("down", size_D, size_F)):
            weight = torch.zeros(num_slots, rows, cols, dtype=torch.float8_e4m3fn, device=device)
            blocks = (num_slots, -(-rows // BLOCK), -(-cols // BLOCK))
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scale", torch.ones(blocks, dtype=torch.float32, device=device))
        if size_F % BLOCK:
            raise ConfigError(f"fp8_block experts need expert_size in whole blocks of {BLOCK}, found {size_F}")

    def forward(self, inbound: Inbound) -> Tensor:
        """Rows [R, D] in expert-major order -> rows [R, D] in the same order, in the rows' dtype."""
        rows_RD, ends_L, backend = inbound.rows_RD, inbound.ends_L, self.backend
        q_RD, scale_RB = quantize_rows(rows_RD, pow2=self.pow2, backend=backend)
        gate_up_R2F = grouped_gemm_fp8(
            q_RD, scale_RB, self.gate_up, self.gate_up_scale, ends_L, out_dtype=rows_RD.dtype, backend=backend
        )
        q_RF, scale_RB = swiglu_quantize(gate_up_R2F, pow2=self.pow2, backend=backend)
        return grouped_gemm_fp8(
            q_RF, scale_RB, self.down, self.down_scale, ends_L, out_dtype=rows_RD.dtype, backend=backend
        )


def make_experts(
    config: MoEConfig, num_slots: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
) -> Experts | Fp8Experts:
    """The form of experts that `config.quant` asks for."""
    kinds: dict[str, type[Experts] | type[Fp8Experts]] = {"none": Experts, "fp8_block": Fp8Experts}
    if config.quant.kind not in kinds:
        raise ConfigError(f"experts can be held as {sorted(kinds)}, found quant kind {config.quant.kind!r}")
    return kinds[config.quant.kind](config, num_slots, dtype, device, backend)
