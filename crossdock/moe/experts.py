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
from crossdock.gemm import (
    BLOCK,
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_gemm_fp8_rowwise,
    grouped_swiglu,
    grouped_swiglu_fp8,
    quantize_rows,
    quantize_whole_rows,
    swiglu,
)
from crossdock.gemm.packed import PackedWeights, can_pack_groups, pack_groups, packed_matmul
from crossdock.moe.config import MoEConfig

MOST_PACKED_BYTES = 1 << 29  # a layer of experts above this is not packed: for a moment there are two of it


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
        rows_RD, ends_L, ids_R, backend = inbound.rows_RD, inbound.ends_L, inbound.row_ids_R, self.backend
        hidden_RF = grouped_swiglu(rows_RD, self.gate_up, ends_L, ids_R, backend=backend)
        return grouped_gemm(hidden_RF, self.down, ends_L, backend=backend, may_end_early=ids_R is not None)

    def packed(self) -> "Experts | PackedExperts":
        """These experts in the form that a CPU multiplies fastest, which may be themselves."""
        weights = self.gate_up, self.down
        size = sum(weight.nbytes for weight in weights)
        helps = self.backend != "triton" and can_pack_groups(self.gate_up) and can_pack_groups(self.down)
        return PackedExperts(*map(pack_groups, weights)) if helps and size <= MOST_PACKED_BYTES else self


class PackedExperts(nn.Module):
    """The same in oneDNN's layout (`crossdock.gemm.packed`): bfloat16 on a CPU, for inference, without parameters."""

    def __init__(self, gate_up: PackedWeights, down: PackedWeights) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, inbound: Inbound) -> Tensor:
        """Rows [R, D] in expert-major order -> rows [R, D] in the same order."""
        if not len(inbound.rows_RD):
            return inbound.rows_RD
        hidden_RF = swiglu(packed_matmul(inbound.rows_RD, self.gate_up, inbound.ends_L))
        return packed_matmul(hidden_RF, self.down, inbound.ends_L)


class Fp8Experts(nn.Module):
    """The same with e4m3 weights in 128x128 blocks, multiplied in FP8 with activations quantised per 1x128.

    For inference only: weights and their fp32 scales are buffers.
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(
        self, config: MoEConfig, num_slots: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.pow2 = config.quant.pow2_scales
        size_D, size_F = config.hidden_size, config.expert_size
        for name, rows, cols in (("gate_up", 2 * size_F, size_D), ("down", size_D, size_F)):
            weight = torch.zeros(num_slots, rows, cols, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.ones(num_slots, *self.scale_shape(rows, cols), dtype=torch.float32, device=device)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scale", scale)
        self.check_size(size_F)

    @staticmethod
    def scale_shape(rows: int, cols: int) -> tuple[int, ...]:
        """How many scales a weight of that shape has."""
        return -(-rows // BLOCK), -(-cols // BLOCK)

    @staticmethod
    def check_size(expert_size: int) -> None:
        """Raises ConfigError where gate and up would share a block."""
        if expert_size % BLOCK:
            raise ConfigError(f"fp8_block experts need expert_size in whole blocks of {BLOCK}, found {expert_size}")

    def forward(self, inbound: Inbound) -> Tensor:
        """Rows [R, D] in expert-major order -> rows [R, D] in the same order, in the rows' dtype."""
        rows_RD, ends_L, ids_R, backend = inbound.rows_RD, inbound.ends_L, inbound.row_ids_R, self.backend
        dtype, pow2 = rows_RD.dtype, self.pow2
        codes_RD, scale_RB = quantize_rows(rows_RD, pow2=pow2, backend=backend)
        weights = self.gate_up, self.gate_up_scale
        codes_RF, scale_RB = grouped_swiglu_fp8(
            codes_RD, scale_RB, *weights, ends_L, ids_R, pow2=pow2, out_dtype=dtype, backend=backend
        )
        weights, early = (self.down, self.down_scale), ids_R is not None
        return grouped_gemm_fp8(codes_RF, scale_RB, *weights, ends_L, dtype, backend, may_end_early=early)


class Fp8RowExperts(Fp8Experts):
    """The same with one scale for each row of activations and for each output column of the weights.

    Nine launches a layer on the device, two more than with blocks: a row's scale needs all of its SwiGLU.
    """

    @staticmethod
    def scale_shape(rows: int, cols: int) -> tuple[int, ...]:
        """How many scales a weight of that shape has."""
        return (rows,)

    @staticmethod
    def check_size(expert_size: int) -> None:
        """Any size will do."""

    def forward(self, inbound: Inbound) -> Tensor:
        """Rows [R, D] in expert-major order -> rows [R, D] in the same order, in the rows' dtype."""
        rows_RD, ends_L, ids_R, backend = inbound.rows_RD, inbound.ends_L, inbound.row_ids_R, self.backend
        codes_RD, scale_R = quantize_whole_rows(rows_RD, pow2=self.pow2, backend=backend)
        weights = self.gate_up, self.gate_up_scale
        gate_up_R2F = grouped_gemm_fp8_rowwise(codes_RD, scale_R, *weights, ends_L, rows_RD.dtype, backend, ids_R)
        codes_RF, scale_R = quantize_whole_rows(swiglu(gate_up_R2F, backend=backend), pow2=self.pow2, backend=backend)
        weights, early = (self.down, self.down_scale), ids_R is not None
        return grouped_gemm_fp8_rowwise(
            codes_RF, scale_R, *weights, ends_L, rows_RD.dtype, backend, may_end_early=early
        )


def make_experts(
    config: MoEConfig, num_slots: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
) -> Experts | Fp8Experts:
    """The form of experts that `config.quant` asks for."""
    kinds: dict[str, type[Experts | Fp8Experts]] = {"none": Experts, "fp8_block": Fp8Experts, "fp8_row": Fp8RowExperts}
    if config.quant.kind not in kinds:
        raise ConfigError(f"experts can be held as {sorted(kinds)}, found quant kind {config.quant.kind!r}")
    return kinds[config.quant.kind](config, num_slots, dtype, device, backend)
