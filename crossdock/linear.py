"""`linear`: a dense product whose rows do not change with their company (batch invariance), on every device.

BLAS libraries pick another kernel for a few rows than for many, and another again with another thread count, so the
same token can get other bits when it is alone than when it is one of eight. Measured with MKL in float32: 1, 2, 3, 5,
7 and 9 rows differ in their last bits from the same rows inside a larger product, multiples of four only where the
inner size is no multiple of four. Padding both to multiples of four costs at most three rows and makes a row's result a
function of that row alone. oneDNN's bfloat16 product is left as it is: with an inner size that is a multiple of 32 its
rounding hides all but one difference in a hundred thousand values. All of this was measured with one to three threads;
from four on, MKL divides narrow products in ways that change bits again, so ranks that are compared must have equally
many. What was tried and rejected: MKL_CBWR=...,STRICT fixes the thread count's share but not the row count's, and has
to be set before torch is imported; a row at a time by matrix-vector products is right and slower from four rows on.

A CPU without instructions for bfloat16 or float16 multiplies them value by value: 10e9 operations a second on a core
that does 77e9 in float32, and 0.8e9 where the weight lies the other way, as for gradients (EPYC with AVX2). There all
products go by float32, part of the weight at a time, and are rounded as before. For 4 rows that takes as long, for 256
a seventh; for one row it takes 1.2 ms in place of 0.3 (768x2048). Rejected: the other way for few rows, as one value in
five thousand gets another last bit by it, and a row's bits would depend on its company.

oneDNN copies a bfloat16 weight into its own blocked layout at every product, which is most of the work where rows are
few. `pack` does it once; what it gives is opaque: it can be multiplied with, and nothing else.

Elementwise functions have the same fault on a smaller scale: torch's vectorised float32 exp, sin and their kin differ
in the last bit from the scalar code that finishes a tensor's (or a thread's) last few elements. Where a row's length is
not a matter of the row alone, they are computed in float64 and rounded.
"""

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROW_QUANTUM = 4  # rows of a float32 product on a CPU, and its inner size, are padded to a multiple of this
LEAST_PACKED = 4096  # values of a weight; torch multiplies smaller ones without oneDNN
MOST_PACKED = 1 << 28  # values; for a moment there are two of a weight
CONVERTED = 1 << 20  # values of a weight at a time: they are read while they are in the cache
TILE = 64  # in whole ones of which columns have the bits of the product in one piece


def linear(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ w^T (+ bias): [M, K] x [N, K] -> [M, N] in x's dtype; each row's bits depend on that row and w only.

    `w_NK` may be packed (`pack`), which changes no bit.
    """
    rows, inner = x_MK.shape
    if w_NK.is_mkldnn:
        if rows == 0:
            return x_MK.new_empty(0, w_NK.shape[0])
        out_MN: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_MK, w_NK, bias_N, "none", [], "")
        return out_MN
    if rows and inner and w_NK.dtype == x_MK.dtype and goes_by_float32(x_MK):
        return _by_float32(x_MK, w_NK, bias_N)
    if x_MK.dtype != torch.float32 or x_MK.device.type != "cpu":
        return F.linear(x_MK, w_NK, bias_N)
    if inner % ROW_QUANTUM:
        x_MK, w_NK = (F.pad(t, (0, -inner % ROW_QUANTUM)) for t in (x_MK, w_NK))
    if rows % ROW_QUANTUM == 0:
        return F.linear(x_MK, w_NK, bias_N)
    if rows == 1:
        return F.linear(x_MK.expand(ROW_QUANTUM, -1), w_NK, bias_N)[:1]
    return F.linear(F.pad(x_MK, (0, 0, 0, -rows % ROW_QUANTUM)), w_NK, bias_N)[:rows]


def _by_float32(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """The same with float32 operands, rounded to x's dtype."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_MK, w_NK, bias_N)):
        out_MN: Tensor = _ByFloat32.apply(x_MK, w_NK, bias_N)  # type: ignore[no-untyped-call]
        return out_MN
    size = max(CONVERTED // w_NK.shape[1] // TILE, 1) * TILE
    out_MN, wide_MK = x_MK.new_empty(len(x_MK), len(w_NK)), x_MK.float()
    for first in range(0, len(w_NK), size):
        part = slice(first, first + size)
        out_MN[:, part] = linear(wide_MK, w_NK[part].float(), None if bias_N is None else bias_N[part].float())
    return out_MN


class _ByFloat32(torch.autograd.Function):
    """Keeps the operands as they are, and not the float32 ones, for its gradients."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MK, w_NK)
        return _by_float32(x_MK, w_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_MN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x_MK, w_NK), dtype, dout_MN = ctx.saved_tensors, dout_MN.dtype, dout_MN.float()
        need_x, need_w, need_bias = ctx.needs_input_grad
        dx_MK = (dout_MN @ w_NK.float()).to(dtype) if need_x else None
        dw_NK = (dout_MN.t() @ x_MK.float()).to(dtype) if need_w else None
        return dx_MK, dw_NK, dout_MN.sum(0).to(dtype) if need_bias else None


def goes_by_float32(x: Tensor) -> bool:
    """Whether products of x's dtype go by float32: half precision on a CPU that has none."""
    return x.device.type == "cpu" and _lacks(x.dtype)


@cache
def _lacks(dtype: torch.dtype) -> bool:
    has = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if has is None or not _is_x86() or not hasattr(torch.ops.mkldnn, has):
        return False
    return not getattr(torch.ops.mkldnn, has)()


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def can_pack(w_NK: Tensor) -> bool:
    """Whether `pack` would change anything: bfloat16 on a CPU whose oneDNN multiplies it, and large enough."""
    if w_NK.dtype != torch.bfloat16 or w_NK.device.type != "cpu" or w_NK.is_mkldnn:
        return False
    if not LEAST_PACKED <= w_NK.numel() <= MOST_PACKED:
        return False
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    is_known = _is_x86() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_onednn and is_known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(w_NK: Tensor) -> Tensor:
    """The weight as `linear` multiplies it fastest, of as many bytes; the weight itself where it is that already."""
    if not can_pack(w_NK):
        return w_NK
    packed_NK: Tensor = torch.ops.mkldnn._reorder_linear_weight(w_NK.detach().contiguous())
    return packed_NK
