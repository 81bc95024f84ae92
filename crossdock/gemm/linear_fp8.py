"""The dense products in block FP8, by the grouped kernels as in `dense`: a weight is a group of its own.

    linear_fp8            x @ w^T
    dense_swiglu_fp8      an MLP's first half, quantised on the way out for the product that follows

Two launches on the triton backend, the rows' quantisation and the product, or the product alone for rows that come as
codes and scales (of `rms_norm_quantize`, say). A row's bits do not depend on the other rows.

Legend: M rows, N output columns, K inner size, F inner size of an MLP, B blocks of 128.
"""

import torch
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_rank, check_same_device
from crossdock.gemm.grouped_fp8_kernel import grouped_gemm_fp8_triton
from crossdock.gemm.grouped_fp8_swiglu_kernel import grouped_swiglu_fp8_triton
from crossdock.gemm.hopper import fast_path
from crossdock.gemm.quant import BLOCK, FLOATS, check_codes, dequantize_blocks, dequantize_rows, quantize_rows
from crossdock.gemm.swiglu import swiglu_quantize
from crossdock.gemm.tile_map import all_rows
from crossdock.linear import linear

Codes = tuple[Tensor, Tensor]  # of `quantize_rows`
Rows = Tensor | Codes


def linear_fp8_ref(q_MK: Tensor, scale_MB: Tensor, wq_NK: Tensor, wscale_BB: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The specification, and the torch backend: dequantise both, multiply in float32 -> [M, N] in `out_dtype`."""
    return linear(dequantize_rows(q_MK, scale_MB), dequantize_blocks(wq_NK, wscale_BB)).to(out_dtype)


def linear_fp8(
    x_MK: Rows,
    wq_NK: Tensor,
    wscale_BB: Tensor,
    *,
    pow2: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x @ w^T for a weight of `quantize_blocks` -> [M, N] in `out_dtype`; for inference.

    x_MK       [M, K] bf16, fp16 or fp32; or (codes, scales) of `quantize_rows`
    wq_NK      [N, K] e4m3, with wscale_BB [ceil(N / 128), ceil(K / 128)] float32
    pow2       round the rows' scales up to powers of two; nothing to do for rows that come quantised
    out_dtype  bf16, fp16 or fp32; None is the rows' own dtype, or bf16 for rows that come quantised

    Summed as `grouped_gemm_fp8` sums. Not differentiable. Raises ConfigError where ranks, shapes, dtypes or devices do
    not fit one another, or for a backend that cannot run here.
    """
    if isinstance(x_MK, Tensor):
        out_dtype = out_dtype or x_MK.dtype
        x_MK = quantize_rows(x_MK, pow2=pow2, backend=backend)
    q_MK, scale_MB = x_MK
    out_dtype = out_dtype or torch.bfloat16
    _check(q_MK, scale_MB, wq_NK, wscale_BB, out_dtype)
    if resolve_backend(backend, q_MK.device) == "torch":
        return linear_fp8_ref(q_MK, scale_MB, wq_NK, wscale_BB, out_dtype)
    w_1NK, wscale_1BB, all_1 = wq_NK[None], wscale_BB[None], all_rows(q_MK.device)
    product = fast_path("fp8_block", grouped_gemm_fp8_triton, q_MK, w_1NK)
    out_MN: Tensor = product(q_MK, scale_MB, w_1NK, wscale_1BB, all_1, out_dtype, slab=max(q_MK.shape[0], 1))
    return out_MN


def dense_swiglu_fp8(
    x_MK: Rows,
    wq_2FK: Tensor,
    wscale_BB: Tensor,
    *,
    pow2: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Codes:
    """`swiglu_quantize(linear_fp8(...))` for a weight whose gate rows come first -> (codes [M, F], scales [M, B]).

    Arguments as of `linear_fp8`: `out_dtype` is what gate and up are rounded to before SwiGLU, and `pow2` is for the
    scales that come out too. One launch behind the rows' quantisation on the triton backend, with the bits of the two;
    where F is no multiple of 128, and a block of weights spans gate and up, it is the two. Raises ConfigError as
    `linear_fp8` does, and for an odd number of weights' rows.
    """
    if isinstance(x_MK, Tensor):
        out_dtype = out_dtype or x_MK.dtype
        x_MK = quantize_rows(x_MK, pow2=pow2, backend=backend)
    (q_MK, scale_MB), out_dtype = x_MK, out_dtype or torch.bfloat16
    if resolve_backend(backend, q_MK.device) == "torch" or wq_2FK.shape[0] % (2 * BLOCK):
        both_M2F = linear_fp8(x_MK, wq_2FK, wscale_BB, out_dtype=out_dtype, backend=backend)
        return swiglu_quantize(both_M2F, pow2=pow2, backend=backend)
    _check(q_MK, scale_MB, wq_2FK, wscale_BB, out_dtype)
    w_12FK, all_1 = wq_2FK[None], all_rows(q_MK.device)
    product = fast_path("fp8_block_swiglu", grouped_swiglu_fp8_triton, q_MK, w_12FK)
    slab = max(len(q_MK), 1)
    codes: Codes = product(q_MK, scale_MB, w_12FK, wscale_BB[None], all_1, pow2, out_dtype, slab=slab)
    return codes


def _check(q_MK: Tensor, scale_MB: Tensor, wq_NK: Tensor, wscale_BB: Tensor, out_dtype: torch.dtype) -> None:
    check_rank("x_MK", q_MK, "M, K")
    check_rank("wq_NK", wq_NK, "N, K")
    (rows, inner), columns = q_MK.shape, wq_NK.shape[0]
    if wq_NK.shape[1] != inner:
        raise ConfigError(f"x_MK has inner size K={inner}, but wq_NK has K={wq_NK.shape[1]}")
    blocks = -(-inner // BLOCK)
    check_codes("x_MK", q_MK, "x_MK's scales", scale_MB, (rows, blocks))
    check_codes("wq_NK", wq_NK, "wscale_BB", wscale_BB, (-(-columns // BLOCK), blocks))
    check_same_device("x_MK", q_MK, ("wq_NK", wq_NK))
    if out_dtype not in FLOATS:
        raise ConfigError(f"out_dtype must be one of {', '.join(map(str, FLOATS))}, found {out_dtype}")
