"""`grouped_gemm`: one product per expert over ragged groups of rows, in one call.

Legend: R rows, L groups (expert slots on this rank), N output columns, K inner size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_dtype, check_groups
from crossdock.gemm.grouped_torch import grouped_matmul, grouped_matmul_dw, grouped_matmul_dx


def grouped_gemm(rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor, backend: Backend = "auto") -> Tensor:
    """out[r] = weights[l] @ rows[r] for every row r of group l -> [R, N] in the rows' dtype."""
    check_groups(rows_RK, weights_LNK, ends_L, "rows_RK", "weights_LNK")
    check_dtype("weights_LNK", weights_LNK, (rows_RK.dtype,), "the dtype of rows_RK")
    if resolve_backend(backend, rows_RK.device) == "triton":
        raise ConfigError("backend='triton' is not available for grouped_gemm")
    if torch.is_grad_enabled() and (rows_RK.requires_grad or weights_LNK.requires_grad):
        out_RN: Tensor = _GroupedGemm.apply(rows_RK, weights_LNK, ends_L)
        return out_RN
    return grouped_matmul(rows_RK, weights_LNK, ends_L)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RK, weights_LNK, ends_L)
        return grouped_matmul(rows_RK, weights_LNK, ends_L)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RK, weights_LNK, ends_L = ctx.saved_tensors
        need_rows, need_weights, _ = ctx.needs_input_grad
        drows_RK = grouped_matmul_dx(dout_RN, weights_LNK, ends_L) if need_rows else None
        dweights_LNK = grouped_matmul_dw(dout_RN, rows_RK, ends_L) if need_weights else None
        return drows_RK, dweights_LNK, None


def grouped_gemm_fp8(
    q_RK: Tensor,
    scale_RB: Tensor,
    wq_LNK: Tensor,
    wscale_LNB: Tensor,
    ends_L: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
) -> Tensor:
    """The same for e4m3 rows (1x128 scales) and weights (128x128 scales) -> [R, N] in `out_dtype`."""
    from crossdock.gemm.quant import dequantize_blocks, dequantize_rows

    rows_RK = dequantize_rows(q_RK, scale_RB, torch.float32)
    return grouped_matmul(rows_RK, dequantize_blocks(wq_LNK, wscale_LNB, torch.float32), ends_L).to(out_dtype)
