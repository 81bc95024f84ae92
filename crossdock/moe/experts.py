"""The experts that live on one rank: gate-up GEMM, SwiGLU, down GEMM over ragged groups of rows.

Legend: L slots on this rank, D hidden, F inner size, R rows received.

Weights stand as gate_up [L, 2F, D] (gate rows first) and down [L, D, F], the order in which a fused Hugging Face
checkpoint stores them; a slot that holds no expert (placement padding) is zeros and receives no rows. In front of the
first slot there may be room for one more, which a shared expert takes where it joins the routed ones (`moe.fused`).
"""

from functools import partial

import torch
from torch import Tensor, nn

from crossdock.backend import Backend
from crossdock.comm import Inbound
from crossdock.errors import ConfigError
from crossdock.gemm import (
    BLOCK,
    Rows,
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_gemm_fp8_rowwise,
    grouped_swiglu,
    grouped_swiglu_fp8,
    quantize_rows,
    quantize_whole_rows,
    swiglu,
)
from crossdock.gemm.checks import check_dtype
from crossdock.gemm.packed import PackedWeights, can_pack_groups, pack_groups, packed_matmul
from crossdock.memory import use_huge_pages
from crossdock.moe.config import MoEConfig
from crossdock.moe.wire import Fp8Wire

MOST_PACKED_BYTES = 1 << 29  # a layer of experts above this is not packed: for a moment there are two of it


class Experts(nn.Module):
    """Parameters of L experts in `dtype`, trainable, with room for `before` more in front of them."""

    NAMES: tuple[str, ...] = ("gate_up", "down")

    def __init__(
        self,
        config: MoEConfig,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend = "auto",
        before: int = 0,
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.before = before
        size_D, size_F, total = config.hidden_size, config.expert_size, before + num_slots
        self.gate_up = nn.Parameter(torch.zeros(total, 2 * size_F, size_D, dtype=dtype, device=device)[before:])
        self.down = nn.Parameter(torch.zeros(total, size_D, size_F, dtype=dtype, device=device)[before:])

    def forward(self, inbound: Inbound) -> Tensor:
        """Rows [R, D] in expert-major order -> rows [R, D] in the same order."""
        rows_RD = inbound.decoded().rows_RD
        return self.multiply(rows_RD, inbound.ends_L, inbound.row_ids_R, self.gate_up, self.down)

    def multiply(self, rows: Rows, ends_L: Tensor, ids_R: Tensor | None, *weights: Tensor) -> Tensor:
        """The same with these weights, in the order of NAMES, for rows that do not come quantised."""
        assert isinstance(rows, Tensor), "codes are for FP8 experts"
        gate_up, down = weights
        hidden_RF = grouped_swiglu(rows, gate_up, ends_L, ids_R, backend=self.backend)
        return grouped_gemm(hidden_RF, down, ends_L, backend=self.backend, may_end_early=ids_R is not None)

    def packed(self) -> "Experts | PackedExperts":
        """These experts in the form that a CPU multiplies fastest, which may be themselves."""
        weights = self.gate_up, self.down
        size = sum(weight.nbytes for weight in weights)
        helps = self.backend != "triton" and can_pack_groups(self.gate_up) and can_pack_groups(self.down)
        if helps and size <= MOST_PACKED_BYTES:
            packed = PackedExperts(*map(pack_groups, weights))
            use_huge_pages((*packed.gate_up, *packed.down))
            return packed
        use_huge_pages(weights)
        return self


class PackedExperts(nn.Module):
    """The same in oneDNN's layout (`crossdock.gemm.packed`): bfloat16 on a CPU, for inference, without parameters."""

    before = 0

    def __init__(self, gate_up: PackedWeights, down: PackedWeights) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, inbound: Inbound) -> Tensor:
        """Rows [R, D] in expert-major order -> rows [R, D] in the same order."""
        inbound = inbound.decoded().in_order()
        if not len(inbound.rows_RD):
            return inbound.rows_RD
        hidden_RF = swiglu(packed_matmul(inbound.rows_RD, self.gate_up, inbound.ends_L))
        return packed_matmul(hidden_RF, self.down, inbound.ends_L)


class Fp8Experts(nn.Module):
    """The same with e4m3 weights in 128x128 blocks, multiplied in FP8 with activations quantised per 1x128.

    For inference only: weights and their fp32 scales are buffers.
    """

    NAMES: tuple[str, ...] = ("gate_up", "gate_up_scale", "down", "down_scale")
    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(
        self,
        config: MoEConfig,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend = "auto",
        before: int = 0,
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.dtype, self.pow2, self.before = dtype, config.quant.pow2_scales, before
        size_D, size_F, total = config.hidden_size, config.expert_size, before + num_slots
        for name, rows, cols in (("gate_up", 2 * size_F, size_D), ("down", size_D, size_F)):
            weight = torch.zeros(total, rows, cols, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.ones(total, *self.scale_shape(rows, cols), dtype=torch.float32, device=device)
            self.register_buffer(name, weight[before:])
            self.register_buffer(f"{name}_scale", scale[before:])
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
        weights = self.gate_up, self.gate_up_scale, self.down, self.down_scale
        return self.multiply(self.take(inbound), inbound.ends_L, inbound.row_ids_R, *weights)

    def take(self, inbound: Inbound) -> Rows:
        """Codes and scales as they came, from a wire that quantises as these experts would."""
        codec = inbound.codec
        if isinstance(codec, Fp8Wire) and codec.pow2 == self.pow2:
            return codec.parts(inbound.rows_RD)
        return inbound.decoded().rows_RD

    def multiply(self, rows: Rows, ends_L: Tensor, ids_R: Tensor | None, *weights: Tensor) -> Tensor:
        """The same for rows [R, D] or their codes and scales, with these weights, in the order of NAMES."""
        if isinstance(rows, Tensor):
            check_dtype("rows_RD", rows, (self.dtype,), "the dtype of the layer")
            rows = quantize_rows(rows, pow2=self.pow2, backend=self.backend)
        gate_up, gate_up_scale, down, down_scale = weights
        dtype, pow2, backend, early = self.dtype, self.pow2, self.backend, ids_R is not None
        codes_RF, scale_RB = grouped_swiglu_fp8(
            *rows, gate_up, gate_up_scale, ends_L, ids_R, pow2=pow2, out_dtype=dtype, backend=backend
        )
        return grouped_gemm_fp8(codes_RF, scale_RB, down, down_scale, ends_L, dtype, backend, may_end_early=early)


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

    def take(self, inbound: Inbound) -> Rows:
        """Rows decoded: a wire's scales are not by row."""
        return inbound.decoded().rows_RD

    def multiply(self, rows: Rows, ends_L: Tensor, ids_R: Tensor | None, *weights: Tensor) -> Tensor:
        """For rows [R, D] in expert-major order that do not come quantised -> [R, D] in the same order."""
        assert isinstance(rows, Tensor), "codes have scales by block"
        gate_up, gate_up_scale, down, down_scale = weights
        dtype, pow2, backend, early = self.dtype, self.pow2, self.backend, ids_R is not None
        product = partial(grouped_gemm_fp8_rowwise, ends_L=ends_L, out_dtype=dtype, backend=backend)
        gate_up_R2F = product(
            *quantize_whole_rows(rows, pow2=pow2, backend=backend), gate_up, gate_up_scale, row_ids_R=ids_R
        )
        codes_RF, scale_R = quantize_whole_rows(swiglu(gate_up_R2F, backend=backend), pow2=pow2, backend=backend)
        return product(codes_RF, scale_R, down, down_scale, may_end_early=early)


def make_experts(
    config: MoEConfig,
    num_slots: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend = "auto",
    before: int = 0,
) -> Experts | Fp8Experts:
    """The form of experts that `config.quant` asks for, with room for `before` more in front of them."""
    kinds: dict[str, type[Experts | Fp8Experts]] = {"none": Experts, "fp8_block": Fp8Experts, "fp8_row": Fp8RowExperts}
    if config.quant.kind not in kinds:
        raise ConfigError(f"experts can be held as {sorted(kinds)}, found quant kind {config.quant.kind!r}")
    return kinds[config.quant.kind](config, num_slots, dtype, device, backend, before)
