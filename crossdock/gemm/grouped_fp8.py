"""The grouped products in FP8, for inference: scales per block or per row, masked, and with SwiGLU behind.

Groups, ends and row ids are those of `grouped`; codes and scales those of `quant`:

    fp8_block   a scale for 1x128 of a row and one for 128x128 of a weight    DeepSeek's checkpoints
    fp8_row     a scale for a row and one for an output column of a weight    what vendors' libraries have

Legend: R rows in group order, T rows in memory (R without row ids), L groups, N output columns, K inner size, B blocks
of 128, M rows of a slab, F inner size of an expert, D hidden size.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_groups, check_halves, check_slabs
from crossdock.gemm.grouped_fp8_kernel import grouped_gemm_fp8_ref, grouped_gemm_fp8_triton
from crossdock.gemm.grouped_fp8_swiglu_kernel import grouped_swiglu_fp8_ref, grouped_swiglu_fp8_triton
from crossdock.gemm.hopper import fast_path
from crossdock.gemm.quant import BLOCK, FLOATS, check_codes
from crossdock.gemm.swiglu import swiglu_quantize


def grouped_gemm_fp8(
    q_RK: Tensor,
    scale_RB: Tensor,
    wq_LNK: Tensor,
    wscale_LBB: Tensor,
    ends_L: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
    *,
    row_ids_R: Tensor | None = None,
    may_end_early: bool = False,
    checked: bool = False,
) -> Tensor:
    """`grouped_gemm` for rows of `quantize_rows` and weights of `quantize_blocks` -> [R, N] in `out_dtype`.

    q_RK        [R, K] e4m3, with scale_RB [R, ceil(K / 128)] float32; [T, ...] with `row_ids_R`
    wq_LNK      [L, N, K] e4m3, with wscale_LBB [L, ceil(N / 128), ceil(K / 128)] float32
    out_dtype   bf16, fp16 or fp32
    ends_L, row_ids_R, may_end_early, checked   as in `grouped_gemm`

    N and K need not be multiples of 128, but on a GPU a K that is no multiple of 16 is read byte by byte, slowly. Each
    block of 128 along K is summed on its own, scaled, and added up in float32 (DeepSeek-V3 technical report, section
    3.3.2). Raises ConfigError as `grouped_gemm` does.
    """
    check_groups(q_RK, wq_LNK, ends_L, "q_RK", "wq_LNK", row_ids_R, may_end_early, checked)
    _check_block_codes("q_RK", q_RK, "scale_RB", scale_RB, "wq_LNK", wq_LNK, wscale_LBB)
    _check_out_dtype(out_dtype)
    product = _product("fp8_block", q_RK, wq_LNK, backend)
    return product(q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L, out_dtype, row_ids_R)


def grouped_gemm_fp8_rowwise(
    q_RK: Tensor,
    scale_R: Tensor,
    wq_LNK: Tensor,
    wscale_LN: Tensor,
    ends_L: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
    row_ids_R: Tensor | None = None,
    *,
    may_end_early: bool = False,
    checked: bool = False,
) -> Tensor:
    """The same with one scale for each row and one for each output column, both of `quantize_whole_rows`.

    q_RK        [R, K] e4m3, with scale_R [R] float32; [T, ...] with `row_ids_R`
    wq_LNK      [L, N, K] e4m3, with wscale_LN [L, N] float32
    out_dtype   bf16, fp16 or fp32

    Summed as `grouped_gemm_fp8` sums, in float32 from one block of 128 along K to the next: Hopper's tensor cores keep
    about 14 bits of a sum of FP8 products, too few for all of K. Raises ConfigError as `grouped_gemm` does.
    """
    check_groups(q_RK, wq_LNK, ends_L, "q_RK", "wq_LNK", row_ids_R, may_end_early, checked)
    check_codes("q_RK", q_RK, "scale_R", scale_R, (q_RK.shape[0],), "row")
    check_codes("wq_LNK", wq_LNK, "wscale_LN", wscale_LN, tuple(wq_LNK.shape[:2]), "output column")
    _check_out_dtype(out_dtype)
    product = _product("fp8_row", q_RK, wq_LNK, backend)
    return product(q_RK, scale_R, wq_LNK, wscale_LN, ends_L, out_dtype, row_ids_R)


def grouped_gemm_fp8_masked(
    q_LMK: Tensor,
    scale_LMB: Tensor,
    wq_LNK: Tensor,
    wscale_LBB: Tensor,
    counts_L: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
    *,
    checked: bool = False,
) -> Tensor:
    """`grouped_gemm_masked` for codes and scales of `quantize_rows` and `quantize_blocks` -> [L, M, N] in `out_dtype`.

    q_LMK       [L, M, K] e4m3, with scale_LMB [L, M, ceil(K / 128)] float32
    wq_LNK      [L, N, K] e4m3, with wscale_LBB [L, ceil(N / 128), ceil(K / 128)] float32
    counts_L    [L] int32, each at most M; rows behind a group's count are neither read nor written

    Raises ConfigError as `grouped_gemm_masked` does.
    """
    check_slabs(q_LMK, wq_LNK, counts_L, "q_LMK", "wq_LNK", checked)
    _check_block_codes("q_LMK", q_LMK, "scale_LMB", scale_LMB, "wq_LNK", wq_LNK, wscale_LBB)
    _check_out_dtype(out_dtype)
    groups, slab, _ = q_LMK.shape
    rows, scales = q_LMK.flatten(0, 1), scale_LMB.flatten(0, 1)
    out = _product("fp8_block", rows, wq_LNK, backend)(rows, scales, wq_LNK, wscale_LBB, counts_L, out_dtype, slab=slab)
    return out.view(groups, slab, wq_LNK.shape[1])


def grouped_swiglu_fp8(
    q_RD: Tensor,
    scale_RB: Tensor,
    wq_L2FD: Tensor,
    wscale_LBB: Tensor,
    ends_L: Tensor,
    row_ids_R: Tensor | None = None,
    *,
    pow2: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """`swiglu_quantize(grouped_gemm_fp8(...))` -> (codes [R, F] e4m3, scales [R, ceil(F / 128)] float32).

    wq_L2FD     [L, 2F, D] e4m3, gate rows first, with wscale_LBB [L, ceil(2F / 128), ceil(D / 128)] float32
    pow2        round the scales that come out up to powers of two
    out_dtype   what gate and up are rounded to before SwiGLU: bf16, fp16 or fp32
    the others  as in `grouped_gemm_fp8`

    One launch on the triton backend, with the bits of the two; where F is no multiple of 128, and a block of weights
    spans gate and up, it is the two. Raises ConfigError as `grouped_gemm` does, and for an odd number of weights' rows.
    """
    check_groups(q_RD, wq_L2FD, ends_L, "q_RD", "wq_L2FD", row_ids_R, checked=checked)
    check_halves("wq_L2FD", wq_L2FD)
    _check_block_codes("q_RD", q_RD, "scale_RB", scale_RB, "wq_L2FD", wq_L2FD, wscale_LBB)
    _check_out_dtype(out_dtype)
    codes = q_RD, scale_RB, wq_L2FD, wscale_LBB, ends_L
    if resolve_backend(backend, q_RD.device) == "torch":
        return grouped_swiglu_fp8_ref(*codes, pow2, out_dtype, row_ids_R)
    if wq_L2FD.shape[1] % (2 * BLOCK) == 0:
        fused = fast_path("fp8_block_swiglu", grouped_swiglu_fp8_triton, q_RD, wq_L2FD)
        pair: tuple[Tensor, Tensor] = fused(*codes, pow2, out_dtype, row_ids_R)
        return pair
    both_R2F = _product("fp8_block", q_RD, wq_L2FD, backend)(*codes, out_dtype, row_ids_R)
    return swiglu_quantize(both_R2F, pow2=pow2, backend=backend)


def _product(
    kind: Literal["fp8_block", "fp8_row"], q_TK: Tensor, wq_LNK: Tensor, backend: Backend
) -> Callable[..., Tensor]:
    """What multiplies these operands: the torch backend, Hopper's launch or the portable one."""
    if resolve_backend(backend, q_TK.device) == "torch":
        return grouped_gemm_fp8_ref
    return fast_path(kind, grouped_gemm_fp8_triton, q_TK, wq_LNK)


def _check_block_codes(
    name: str, codes: Tensor, scale_name: str, scale: Tensor, weights_name: str, wq_LNK: Tensor, wscale_LBB: Tensor
) -> None:
    groups, columns, inner = wq_LNK.shape
    blocks = -(-inner // BLOCK)
    check_codes(name, codes, scale_name, scale, (*codes.shape[:-1], blocks))
    check_codes(weights_name, wq_LNK, "wscale_LBB", wscale_LBB, (groups, -(-columns // BLOCK), blocks))


def _check_out_dtype(out_dtype: torch.dtype) -> None:
    if out_dtype not in FLOATS:
        raise ConfigError(f"out_dtype must be one of {', '.join(map(str, FLOATS))}, found {out_dtype}")
