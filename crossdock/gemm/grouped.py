"""`grouped_gemm`: one product per expert over ragged groups of rows, in one call.

`ends` says where each group's rows end (the convention of F.grouped_mm's `offs`), and stays on the device:

    ends      3     3         9
    rows      a a a | | b b b b b b        group 0 has rows 0-2, group 1 none, group 2 rows 3-8
    weights   0       1   2

Legend: R rows, L groups (expert slots on this rank), N output columns, K inner size, B blocks of 128.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_dtype, check_groups
from crossdock.gemm.grouped_dw_kernel import grouped_dw_triton
from crossdock.gemm.grouped_fp8_kernel import grouped_gemm_fp8_ref, grouped_gemm_fp8_triton
from crossdock.gemm.grouped_kernel import grouped_gemm_triton
from crossdock.gemm.grouped_torch import grouped_matmul, grouped_matmul_dw, grouped_matmul_dx
from crossdock.gemm.quant import BLOCK, FLOATS, check_codes


def grouped_gemm(rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor, backend: Backend = "auto") -> Tensor:
    """out[r] = weights[l] @ rows[r] for every row r of group l -> [R, N] in the rows' dtype; differentiable.

    rows_RK      [R, K] bf16, fp16 or fp32 (fp64 too on the torch backend)
    weights_LNK  [L, N, K] in the same dtype; may be a transposed view
    ends_L       [L] int32: the row after each group's last; never decreases, and the last is R

    Sums are in float32 (float64 for fp64). A row's bits do not depend on the other rows: on the triton backend in every
    dtype, on the torch backend in float32 on a CPU. The triton backend never waits for the device, forward or backward.
    Raises ConfigError where ranks, shapes, dtypes or devices do not fit one another, where
    `ends_L` on a CPU breaks its rule (on a GPU it is not read), or for a backend that cannot run here.
    """
    check_groups(rows_RK, weights_LNK, ends_L, "rows_RK", "weights_LNK")
    on_triton = resolve_backend(backend, rows_RK.device) == "triton"
    check_dtype("rows_RK", rows_RK, FLOATS if on_triton else (*FLOATS, torch.float64), "what this backend multiplies")
    check_dtype("weights_LNK", weights_LNK, (rows_RK.dtype,), "the dtype of rows_RK")
    if torch.is_grad_enabled() and (rows_RK.requires_grad or weights_LNK.requires_grad):
        out_RN: Tensor = _GroupedGemm.apply(rows_RK, weights_LNK, ends_L, on_triton)  # type: ignore[no-untyped-call]
        return out_RN
    return (
        grouped_gemm_triton(rows_RK, weights_LNK, ends_L) if on_triton else grouped_matmul(rows_RK, weights_LNK, ends_L)
    )


class _GroupedGemm(torch.autograd.Function):
    """dx is the same product with the weights transposed; dW is one product a group over that group's rows."""

    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor, on_triton: bool) -> Tensor:
        ctx.save_for_backward(rows_RK, weights_LNK, ends_L)
        ctx.on_triton = on_triton
        return (grouped_gemm_triton if on_triton else grouped_matmul)(rows_RK, weights_LNK, ends_L)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_RK, weights_LNK, ends_L = ctx.saved_tensors
        need_rows, need_weights, *_ = ctx.needs_input_grad
        drows_RK = dweights_LNK = None
        if need_rows and ctx.on_triton:
            drows_RK = grouped_gemm_triton(dout_RN, weights_LNK.transpose(1, 2), ends_L)
        elif need_rows:
            drows_RK = grouped_matmul_dx(dout_RN, weights_LNK, ends_L)
        if need_weights:
            dweights_LNK = (grouped_dw_triton if ctx.on_triton else grouped_matmul_dw)(dout_RN, rows_RK, ends_L)
        return drows_RK, dweights_LNK, None, None


def grouped_gemm_fp8(
    q_RK: Tensor,
    scale_RB: Tensor,
    wq_LNK: Tensor,
    wscale_LBB: Tensor,
    ends_L: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
) -> Tensor:
    """The same for rows of `quantize_rows` and weights of `quantize_blocks` -> [R, N] in `out_dtype`; for inference.

    q_RK        [R, K] e4m3, with scale_RB [R, ceil(K / 128)] float32
    wq_LNK      [L, N, K] e4m3, with wscale_LBB [L, ceil(N / 128), ceil(K / 128)] float32
    ends_L      [L] int32, as in `grouped_gemm`
    out_dtype   bf16, fp16 or fp32

    N and K need not be multiples of 128, but on a GPU a K that is no multiple of 16 is read byte by byte, slowly. Each
    block of 128 along K is summed on its own, scaled, and added up in float32 (DeepSeek-V3 technical report, section
    3.3.2). Raises ConfigError as `grouped_gemm` does.
    """
    check_groups(q_RK, wq_LNK, ends_L, "q_RK", "wq_LNK")
    groups, columns, inner = wq_LNK.shape
    blocks = -(-inner // BLOCK)
    check_codes("q_RK", q_RK, "scale_RB", scale_RB, (q_RK.shape[0], blocks))
    check_codes("wq_LNK", wq_LNK, "wscale_LBB", wscale_LBB, (groups, -(-columns // BLOCK), blocks))
    if out_dtype not in FLOATS:
        raise ConfigError(f"out_dtype must be one of {', '.join(map(str, FLOATS))}, found {out_dtype}")
    if resolve_backend(backend, q_RK.device) == "triton":
        return grouped_gemm_fp8_triton(q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L, out_dtype)
    return grouped_gemm_fp8_ref(q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L, out_dtype)
