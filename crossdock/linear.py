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

Elementwise functions have the same fault on a smaller scale: torch's vectorised float32 exp, sin and their kin differ
in the last bit from the scalar code that finishes a tensor's (or a thread's) last few elements. Where a row's length is
not a matter of the row alone, they are computed in float64 and rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_QUANTUM = 4  # rows of a float32 product on a CPU, and its inner size, are padded to a multiple of this


def linear(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ w^T (+ bias): [M, K] x [N, K] -> [M, N] in x's dtype; each row's bits depend on that row and w only."""
    rows, inner = x_MK.shape
    if x_MK.dtype != torch.float32 or x_MK.device.type != "cpu":
        return F.linear(x_MK, w_NK, bias_N)
    if inner % ROW_QUANTUM:
        x_MK, w_NK = (F.pad(t, (0, -inner % ROW_QUANTUM)) for t in (x_MK, w_NK))
    if rows % ROW_QUANTUM == 0:
        return F.linear(x_MK, w_NK, bias_N)
    if rows == 1:
        return F.linear(x_MK.expand(ROW_QUANTUM, -1), w_NK, bias_N)[:1]
    return F.linear(F.pad(x_MK, (0, 0, 0, -rows % ROW_QUANTUM)), w_NK, bias_N)[:rows]
