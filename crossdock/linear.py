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

oneDNN copies a bfloat16 weight into its own blocked layout at every product, which is most of the work where rows are
few. `pack` does it once; what it gives is opaque: it can be multiplied with, and nothing else.

Elementwise functions have the same fault on a smaller scale: torch's vectorised float32 exp, sin and their kin differ
in the last bit from the scalar code that finishes a tensor's (or a thread's) last few elements. Where a row's length is
not a matter of the row alone, they are computed in float64 and rounded.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_QUANTUM = 4  # rows of a float32 product on a CPU, and its inner size, are padded to a multiple of this
LEAST_PACKED = 4096  # values of a weight; torch multiplies smaller ones without oneDNN
MOST_PACKED = 1 << 28  # values; for a moment there are two of a weight


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
    if x_MK.dtype != torch.float32 or x_MK.device.type != "cpu":
        return F.linear(x_MK, w_NK, bias_N)
    if inner % ROW_QUANTUM:
        x_MK, w_NK = (F.pad(t, (0, -inner % ROW_QUANTUM)) for t in (x_MK, w_NK))
    if rows % ROW_QUANTUM == 0:
        return F.linear(x_MK, w_NK, bias_N)
    if rows == 1:
        return F.linear(x_MK.expand(ROW_QUANTUM, -1), w_NK, bias_N)[:1]
    return F.linear(F.pad(x_MK, (0, 0, 0, -rows % ROW_QUANTUM)), w_NK, bias_N)[:rows]


def can_pack(w_NK: Tensor) -> bool:
    """Whether `pack` would change anything: bfloat16 on a CPU whose oneDNN multiplies it, and large enough."""
    if w_NK.dtype != torch.bfloat16 or w_NK.device.type != "cpu" or w_NK.is_mkldnn:
        return False
    if not LEAST_PACKED <= w_NK.numel() <= MOST_PACKED:
        return False
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    is_known = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_onednn and is_known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(w_NK: Tensor) -> Tensor:
    """The weight as `linear` multiplies it fastest, of as many bytes; the weight itself where it is that already."""
    if not can_pack(w_NK):
        return w_NK
    packed_NK: Tensor = torch.ops.mkldnn._reorder_linear_weight(w_NK.detach().contiguous())
    return packed_NK
