"""Dense products by the grouped kernels: the weight is one group, and its rows are all there are.

    dense_gemm(x, w)          x @ w^T
    dense_swiglu(x, w)        silu(x @ gate^T) * (x @ up^T), an MLP's first half, in one launch

A vendor's BLAS multiplies as fast, but takes another kernel for a few rows than for many. Here a row's bits depend on
that row only, and a shared expert has the bits that it has as one more group beside the routed ones (`moe.fused`). The
same in FP8 stands in `linear_fp8`. On the torch backend these are `linear` and `swiglu`.

A kernel is told the number of rows as the slab of the masked layout: ends on the device would be one more tensor to
write for every number of rows, and a launch. Where a gradient is wanted they are written, and the products are the
grouped ones with theirs.

Legend: M rows, N output columns, K inner size, F inner size of an MLP.
"""

import torch
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_dtype, check_halves, check_rank, check_same_device
from crossdock.gemm.grouped import grouped_gemm, grouped_swiglu
from crossdock.gemm.grouped_kernel import grouped_gemm_triton
from crossdock.gemm.grouped_swiglu_kernel import grouped_swiglu_triton
from crossdock.gemm.hopper import fast_path
from crossdock.gemm.quant import FLOATS
from crossdock.gemm.swiglu import swiglu
from crossdock.gemm.tile_map import all_rows
from crossdock.linear import linear


def dense_gemm(x_MK: Tensor, w_NK: Tensor, backend: Backend = "auto") -> Tensor:
    """x @ w^T: [M, K] x [N, K] -> [M, N], both bf16, fp16 or fp32; differentiable.

    Sums are in float32, and a row's bits do not depend on the other rows: on the triton backend in every dtype, on the
    torch backend as `crossdock.linear` says. There the weight may be packed. Raises ConfigError where ranks, shapes,
    dtypes or devices do not fit one another, or for a backend that cannot run here.
    """
    if resolve_backend(backend, x_MK.device) == "torch":
        return linear(x_MK, w_NK)
    _check(x_MK, w_NK)
    if _needs_gradient(x_MK, w_NK):
        return grouped_gemm(x_MK, w_NK[None], _ends(x_MK), backend)
    product = fast_path("bf16", grouped_gemm_triton, x_MK, w_NK[None])
    out_MN: Tensor = product(x_MK, w_NK[None], all_rows(x_MK.device), slab=max(len(x_MK), 1))
    return out_MN


def dense_swiglu(x_MK: Tensor, gate_up_2FK: Tensor, backend: Backend = "auto") -> Tensor:
    """`swiglu(dense_gemm(...))` for a weight whose gate rows come first -> [M, F]; differentiable.

    One launch on the triton backend, with the bits of the two; where a gradient is needed it is the two. Raises
    ConfigError as `dense_gemm` does, and for an odd number of weights' rows.
    """
    if resolve_backend(backend, x_MK.device) == "torch":
        return swiglu(linear(x_MK, gate_up_2FK), backend)
    _check(x_MK, gate_up_2FK)
    check_halves("gate_up_2FK", gate_up_2FK[None])
    gate_up_12FK = gate_up_2FK.contiguous()[None]
    if _needs_gradient(x_MK, gate_up_2FK):
        return grouped_swiglu(x_MK, gate_up_12FK, _ends(x_MK), backend=backend)
    product = fast_path("bf16_swiglu", grouped_swiglu_triton, x_MK, gate_up_12FK)
    out_MF: Tensor = product(x_MK, gate_up_12FK, all_rows(x_MK.device), slab=max(len(x_MK), 1))
    return out_MF


def _ends(x_MK: Tensor) -> Tensor:
    return torch.full((1,), len(x_MK), dtype=torch.int32, device=x_MK.device)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check(x_MK: Tensor, w_NK: Tensor) -> None:
    check_rank("x_MK", x_MK, "M, K")
    check_rank("w_NK", w_NK, "N, K")
    if w_NK.shape[1] != x_MK.shape[1]:
        raise ConfigError(f"x_MK has inner size K={x_MK.shape[1]}, but w_NK has K={w_NK.shape[1]}")
    check_dtype("x_MK", x_MK, FLOATS, "what this backend multiplies")
    check_dtype("w_NK", w_NK, (x_MK.dtype,), "the dtype of x_MK")
    check_same_device("x_MK", x_MK, ("w_NK", w_NK))
