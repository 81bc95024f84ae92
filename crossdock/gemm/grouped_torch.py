"""The grouped product in plain torch: the fast path on CPUs, and the gradients of it.

Legend: R rows, L groups, N output columns, K inner size; A and B the inner and outer size of one product.

Measured on 2 cores with 16 groups of 256x128, 1 thread, in microseconds:

                            float32                  bfloat16
    rows             1    8   64   2048        1     8    64   2048
    F.grouped_mm    23   48  151   1483       38   148   293    881
    a loop          18  102  266   1864       29   209   429   1103
    this file       19   87  228   1604       as F.grouped_mm

F.grouped_mm wins, but in float32 its rows get other bits in a group of 1 to 3 (see crossdock.linear), so it serves
bfloat16 only, and there only while most groups have rows: it spends 0.8 us on each empty one. In float32 every group's
product runs over a whole number of quanta of rows by reading on into the next group's rows, and the next group's
product overwrites what that left behind: no padded copy of the rows is made. On CPUs without bfloat16 or float16
their products take that way too, in float32 (see crossdock.linear), and so do their gradients.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.gemm.tile_map import spans
from crossdock.linear import ROW_QUANTUM, goes_by_float32

FEW_ROWS, SMALL_WEIGHT = 16, 1 << 17  # below both, copying weights costs less than a call a group (bfloat16)
MAX_GROUPS_PER_FILLED = 8  # F.grouped_mm loses to the loop where fewer than one group in this many has rows


def grouped_matmul(rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor) -> Tensor:
    """rows[start:end] @ weights[l]^T for every group l -> [R, N]; in float32 a row's bits depend on no other row."""
    is_small = rows_RK.shape[0] <= FEW_ROWS and weights_LNK.shape[1] * weights_LNK.shape[2] <= SMALL_WEIGHT
    is_half = rows_RK.dtype == torch.bfloat16 and rows_RK.device.type == "cpu"
    if is_small and is_half and not goes_by_float32(rows_RK):
        return _one_batch(rows_RK, weights_LNK, ends_L)
    return _product(rows_RK, weights_LNK.transpose(1, 2), ends_L)


def grouped_matmul_dx(dout_RN: Tensor, weights_LNK: Tensor, ends_L: Tensor) -> Tensor:
    """Gradient of the rows: dout[start:end] @ weights[l] -> [R, K]."""
    return _product(dout_RN, weights_LNK, ends_L)


def grouped_matmul_dw(dout_RN: Tensor, rows_RK: Tensor, ends_L: Tensor) -> Tensor:
    """Gradient of the weights: dout[start:end]^T @ rows[start:end] -> [L, N, K], zeros for empty groups."""
    dw_LNK = rows_RK.new_empty(ends_L.shape[0], dout_RN.shape[1], rows_RK.shape[1])
    if goes_by_float32(rows_RK):
        dout_RN, rows_RK = dout_RN.float(), rows_RK.float()
    start = 0
    for dw_NK, end in zip(dw_LNK.unbind(0), ends_L.tolist(), strict=True):
        if end > start and dw_NK.dtype == rows_RK.dtype:
            torch.mm(dout_RN[start:end].t(), rows_RK[start:end], out=dw_NK)
        elif end > start:
            dw_NK.copy_(dout_RN[start:end].t() @ rows_RK[start:end])
        else:
            dw_NK.zero_()
        start = end
    return dw_LNK


def _product(rows_RA: Tensor, weights_LAB: Tensor, ends_L: Tensor) -> Tensor:
    """rows[start:end] @ weights[l] -> [R, B]."""
    takes_grouped_mm = rows_RA.dtype == torch.bfloat16 and all(map(_is_aligned, (rows_RA, weights_LAB)))
    if takes_grouped_mm and rows_RA.device.type != "cpu" and rows_RA.shape[0]:
        return F.grouped_mm(rows_RA, weights_LAB, offs=ends_L)
    filled = list(spans(ends_L))
    if goes_by_float32(rows_RA):
        return _by_float32(rows_RA, weights_LAB, filled)
    if takes_grouped_mm and ends_L.shape[0] <= MAX_GROUPS_PER_FILLED * len(filled):
        return F.grouped_mm(rows_RA, weights_LAB, offs=ends_L)
    return _loop(rows_RA, weights_LAB, filled)


def _by_float32(rows_RA: Tensor, weights_LAB: Tensor, filled: list[tuple[int, int, int]]) -> Tensor:
    """The same with float32 operands, rounded; each group's product reads on into the next group's rows, as in `_loop`.

    Rows and a weight are converted when their group's turn comes, while they are in the cache.
    """
    out_RB, more = rows_RA.new_empty(len(rows_RA), weights_LAB.shape[2]), -rows_RA.shape[1] % ROW_QUANTUM
    for group, start, end in filled:
        whole = -(-(end - start) // ROW_QUANTUM) * ROW_QUANTUM
        some_RA, weight_AB = rows_RA[start : start + whole].float(), weights_LAB[group].float()
        if more or len(some_RA) < whole:
            some_RA = F.pad(some_RA, (0, more, 0, whole - len(some_RA)))
            weight_AB = F.pad(weight_AB, (0, 0, 0, more))
        out_RB[start:end] = torch.mm(some_RA, weight_AB)[: end - start]
    return out_RB


def _one_batch(rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor) -> Tensor:
    """A copy of its group's weight for each row, and all rows as one batch of products."""
    group_R = ends_L.numpy().searchsorted(np.arange(rows_RK.shape[0]), side="right")
    weights_RNK = weights_LNK.index_select(0, torch.from_numpy(group_R))
    return torch.bmm(rows_RK.unsqueeze(1), weights_RNK.transpose(1, 2)).squeeze(1)


def _loop(rows_RA: Tensor, weights_LAB: Tensor, filled: list[tuple[int, int, int]]) -> Tensor:
    """One product a group, over whole quanta of rows where the BLAS makes a row's bits depend on their number.

    A quantum of 4, groups of 2, 5 and 1 rows; each line is one product, later ones overwrite:

        a a . .
            b b b b b . . .
                      c . . .      (the last reads zeros behind the last row)
    """
    count, inner = rows_RA.shape
    quantum = ROW_QUANTUM if rows_RA.dtype == torch.float32 and rows_RA.device.type == "cpu" else 1
    out_RB = rows_RA.new_empty(count + quantum - 1, weights_LAB.shape[2])
    if inner % quantum:  # the inner size matters too: see crossdock.linear
        rows_RA = F.pad(rows_RA, (0, -inner % quantum))
        weights_LAB = F.pad(weights_LAB.transpose(1, 2), (0, -inner % quantum)).transpose(1, 2)
    source_RA, base = rows_RA, 0
    for group, start, end in filled:
        rows = -(-(end - start) // quantum) * quantum
        if start + rows > count and base == 0 and source_RA is rows_RA:
            source_RA, base = F.pad(rows_RA[start:], (0, 0, 0, quantum - 1)), start
        torch.mm(
            source_RA.narrow(0, start - base, rows), weights_LAB.select(0, group), out=out_RB.narrow(0, start, rows)
        )
    return out_RB[:count]


def _is_aligned(tensor: Tensor) -> bool:
    """Whether F.grouped_mm takes it: unit stride along one of the last two dimensions, 16-byte steps elsewhere."""
    per_16_bytes = 16 // tensor.element_size()
    *lead, a, b = tensor.stride()
    steps = (*lead, max(a, b))
    return min(a, b) == 1 and tensor.data_ptr() % 16 == 0 and all(stride % per_16_bytes == 0 for stride in steps)
