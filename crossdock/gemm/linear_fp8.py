"""`linear_fp8`: a dense product in block FP8, from the pieces of the grouped one: a weight is a group of its own.

Two launches on the triton backend, the rows' quantisation and the product, or the product alone for rows that come as
codes and scales (of `rms_norm_quantize`, say). A row's bits do not depend on the other rows.

The product is told its number of rows as a slab and not as an end on the device: an end would be one more tensor to
write for every number of rows, and a launch.

Legend: M rows, N output columns, K inner size, B blocks of 128.
"""

from functools import lru_cache

import torch
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_rank, check_same_device
from crossdock.gemm.grouped_fp8_kernel import grouped_gemm_fp8_triton
from crossdock.gemm.hopper import fast_path
from crossdock.gemm.quant import BLOCK, FLOATS, check_codes, dequantize_blocks, dequantize_rows, quantize_rows
from crossdock.linear import linear

Rows = Tensor | tuple[Tensor, Tensor]


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
    w_1NK, wscale_1BB, all_1 = wq_NK[None], wscale_BB[None], _all_rows(q_MK.device)
    product = fast_path("fp8_block", grouped_gemm_fp8_triton, q_MK, w_1NK)
    out_MN: Tensor = product(q_MK, scale_MB, w_1NK, wscale_1BB, all_1, out_dtype, slab=max(q_MK.shape[0], 1))
    return out_MN


def _all_rows(device: torch.device) -> Tensor:
    """A count no slab reaches: all of its rows. Not kept where a graph is captured, as the graph owns its tensors."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _count(device)
    return _kept_count(device)


def _count(device: torch.device) -> Tensor:
    return torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)


_kept_count = lru_cache(_count)


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
