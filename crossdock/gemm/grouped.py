"""`grouped_gemm`: one product per expert over ragged groups of rows, in one call; its masked form; and with SwiGLU.

`ends` says where each group's rows end (the convention of F.grouped_mm's `offs`), and stays on the device:

    ends      3     3         9
    rows      a a a | | b b b b b b        group 0 has rows 0-2, group 1 none, group 2 rows 3-8
    weights   0       1   2

`row_ids` puts rows into that order on the way in, without a copy of them: row r of the order is rows[row_ids[r]], a row
may be named many times, and the order may be longer than its last end; what lies behind it is not touched. The products
for FP8 stand in `grouped_fp8`. Which kernel runs where is told in `hopper` and `configs`.

Legend: R rows in group order, T rows in memory (R without `row_ids`), L groups (expert slots on this rank), N output
columns, K inner size, M rows of a slab, F inner size of an expert, D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_dtype, check_groups, check_halves, check_slabs
from crossdock.gemm.grouped_dw_kernel import grouped_dw_triton
from crossdock.gemm.grouped_kernel import grouped_gemm_triton
from crossdock.gemm.grouped_swiglu_kernel import grouped_swiglu_triton
from crossdock.gemm.grouped_torch import grouped_matmul, grouped_matmul_dw, grouped_matmul_dx
from crossdock.gemm.hopper import fast_path
from crossdock.gemm.quant import FLOATS
from crossdock.gemm.swiglu import swiglu
from crossdock.gemm.tile_map import gather_rows, spans
from crossdock.linear import linear


def grouped_gemm(
    rows_RK: Tensor,
    weights_LNK: Tensor,
    ends_L: Tensor,
    backend: Backend = "auto",
    *,
    row_ids_R: Tensor | None = None,
    may_end_early: bool = False,
    checked: bool = False,
) -> Tensor:
    """out[r] = weights[l] @ rows[r] for every row r of group l -> [R, N] in the rows' dtype; differentiable.

    rows_RK        [R, K] bf16, fp16 or fp32 (fp64 too on the torch backend); [T, K] with `row_ids_R`
    weights_LNK    [L, N, K] in the same dtype; may be a transposed view
    ends_L         [L] int32: the row after each group's last; never decreases, and the last is R
    row_ids_R      [R] int32 or int64, or None: row r is rows[row_ids[r]]
    may_end_early  the last end may be below R, as it may with `row_ids_R`: rows and ids behind it are not read, and
                   rows of the output behind it mean nothing (no kernel writes them)
    checked        read `ends_L` and `row_ids_R` and check them on a GPU too, which waits for the device

    Sums are in float32 (float64 for fp64). A row's bits do not depend on the other rows: on the triton backend in every
    dtype, on the torch backend in float32 on a CPU. The triton backend never waits for the device, forward or backward.
    Where a gradient is needed, rows are gathered by a copy first. Raises ConfigError where ranks, shapes, dtypes or
    devices do not fit one another, where `ends_L` or `row_ids_R` break their rules (on a GPU they are read only where
    `checked`), or for a backend that cannot run here.
    """
    check_groups(rows_RK, weights_LNK, ends_L, "rows_RK", "weights_LNK", row_ids_R, may_end_early, checked)
    on_triton = resolve_backend(backend, rows_RK.device) == "triton"
    _check_floats("rows_RK", rows_RK, "weights_LNK", weights_LNK, on_triton)
    return _product(rows_RK, weights_LNK, ends_L, row_ids_R, on_triton, may_end_early)


def _product(
    rows_TK: Tensor,
    weights_LNK: Tensor,
    ends_L: Tensor,
    row_ids_R: Tensor | None,
    on_triton: bool,
    may_end_early: bool = False,
) -> Tensor:
    needs_gradient = _needs_gradient(rows_TK, weights_LNK)
    if on_triton and not needs_gradient:
        return _launch(rows_TK, weights_LNK, ends_L, row_ids_R)
    rows = len(rows_TK) if row_ids_R is None else len(row_ids_R)
    rows_RK = _in_order(rows_TK, row_ids_R, ends_L)
    if needs_gradient and may_end_early and row_ids_R is None and not _knows_ends(ends_L):
        used_R = torch.arange(len(rows_RK), device=ends_L.device) < ends_L[-1:].sum()
        rows_RK = torch.where(used_R[:, None], rows_RK, 0.0)  # no gradient reaches rows that none has been computed for
    if needs_gradient:
        out_RN: Tensor = _GroupedGemm.apply(rows_RK, weights_LNK, ends_L, on_triton)  # type: ignore[no-untyped-call]
    else:
        out_RN = grouped_matmul(rows_RK, weights_LNK, ends_L)
    return out_RN if len(out_RN) == rows else F.pad(out_RN, (0, 0, 0, rows - len(out_RN)))


def _knows_ends(ends_L: Tensor) -> bool:
    """Whether the host can read them without waiting."""
    return ends_L.device.type == "cpu"


def _in_order(rows_TK: Tensor, row_ids_R: Tensor | None, ends_L: Tensor) -> Tensor:
    """Rows in group order; on a CPU, where the host may know how many are in use, those alone."""
    if not _knows_ends(ends_L):
        return rows_TK if row_ids_R is None else gather_rows(rows_TK, row_ids_R, ends_L)
    used = int(ends_L.numpy()[-1]) if len(ends_L) else 0
    if row_ids_R is not None:
        return rows_TK.index_select(0, row_ids_R[:used])
    return rows_TK if used == len(rows_TK) else rows_TK[:used]


def _launch(
    rows_TK: Tensor, weights_LNK: Tensor, ends_L: Tensor, row_ids_R: Tensor | None = None, slab: int = 0
) -> Tensor:
    product = fast_path("bf16", grouped_gemm_triton, rows_TK, weights_LNK)  # which takes no float32
    out_RN: Tensor = product(rows_TK, weights_LNK, ends_L, row_ids_R, slab)
    return out_RN


class _GroupedGemm(torch.autograd.Function):
    """dx is the same product with the weights transposed; dW is one product a group over that group's rows."""

    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor, on_triton: bool) -> Tensor:
        ctx.save_for_backward(rows_RK, weights_LNK, ends_L)
        ctx.on_triton = on_triton
        return (_launch if on_triton else grouped_matmul)(rows_RK, weights_LNK, ends_L)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_RK, weights_LNK, ends_L = ctx.saved_tensors
        need_rows, need_weights, *_ = ctx.needs_input_grad
        drows_RK = dweights_LNK = None
        if need_rows and ctx.on_triton:
            drows_RK = _launch(dout_RN, weights_LNK.transpose(1, 2), ends_L)
        elif need_rows:
            drows_RK = grouped_matmul_dx(dout_RN, weights_LNK, ends_L)
        if need_weights:
            dweights_LNK = (grouped_dw_triton if ctx.on_triton else grouped_matmul_dw)(dout_RN, rows_RK, ends_L)
        return drows_RK, dweights_LNK, None, None


def grouped_gemm_masked(
    rows_LMK: Tensor, weights_LNK: Tensor, counts_L: Tensor, backend: Backend = "auto", *, checked: bool = False
) -> Tensor:
    """The same for groups that stand M rows apart, the first `counts[l]` of which are used -> [L, M, N]; for inference.

    rows_LMK     [L, M, K] bf16, fp16 or fp32
    weights_LNK  [L, N, K] in the same dtype; may be a transposed view
    counts_L     [L] int32, each at most M
    checked      read `counts_L` and check them on a GPU too, which waits for the device

    Rows behind a group's count are neither read nor written. The bits of a row are those `grouped_gemm` gives it on the
    triton backend, and on a CPU in float32. Raises ConfigError as `grouped_gemm` does, and where a gradient is needed.
    """
    check_slabs(rows_LMK, weights_LNK, counts_L, "rows_LMK", "weights_LNK", checked)
    on_triton = resolve_backend(backend, rows_LMK.device) == "triton"
    _check_floats("rows_LMK", rows_LMK, "weights_LNK", weights_LNK, on_triton=True)
    if _needs_gradient(rows_LMK, weights_LNK):
        raise ConfigError("grouped_gemm_masked has no gradient, but rows_LMK or weights_LNK requires one")
    groups, slab, _ = rows_LMK.shape
    if on_triton:
        out = _launch(rows_LMK.flatten(0, 1), weights_LNK, counts_L, slab=slab)
        return out.view(groups, slab, weights_LNK.shape[1])
    out_LMN = rows_LMK.new_empty(groups, slab, weights_LNK.shape[1])
    for group, start, end in spans(counts_L, slab):
        count = end - start
        out_LMN[group, :count] = linear(rows_LMK[group, :count], weights_LNK[group])
    return out_LMN


def grouped_swiglu(
    rows_RD: Tensor,
    gate_up_L2FD: Tensor,
    ends_L: Tensor,
    row_ids_R: Tensor | None = None,
    backend: Backend = "auto",
    *,
    checked: bool = False,
) -> Tensor:
    """`swiglu(grouped_gemm(...))`, an expert's first half -> [R, F] in the rows' dtype; differentiable.

    gate_up_L2FD  [L, 2F, D]: gate rows first; the other arguments as in `grouped_gemm`

    One launch on the triton backend, with the bits of the two. Where a gradient is needed, or D is not the weights'
    dimension of unit stride, it is the two. Raises ConfigError as `grouped_gemm` does, and for an odd number of
    weights' rows.
    """
    check_groups(rows_RD, gate_up_L2FD, ends_L, "rows_RD", "gate_up_L2FD", row_ids_R, checked=checked)
    on_triton = resolve_backend(backend, rows_RD.device) == "triton"
    _check_floats("rows_RD", rows_RD, "gate_up_L2FD", gate_up_L2FD, on_triton)
    check_halves("gate_up_L2FD", gate_up_L2FD)
    if on_triton and gate_up_L2FD.stride(2) == 1 and not _needs_gradient(rows_RD, gate_up_L2FD):
        product = fast_path("bf16_swiglu", grouped_swiglu_triton, rows_RD, gate_up_L2FD)
        out_RF: Tensor = product(rows_RD, gate_up_L2FD, ends_L, row_ids_R)
        return out_RF
    return swiglu(_product(rows_RD, gate_up_L2FD, ends_L, row_ids_R, on_triton), backend)


def _check_floats(rows_name: str, rows: Tensor, weights_name: str, weights_LNK: Tensor, on_triton: bool) -> None:
    """Raises ConfigError unless both are of one dtype, which the backend multiplies."""
    check_dtype(rows_name, rows, FLOATS if on_triton else (*FLOATS, torch.float64), "what this backend multiplies")
    check_dtype(weights_name, weights_LNK, (rows.dtype,), f"the dtype of {rows_name}")


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
