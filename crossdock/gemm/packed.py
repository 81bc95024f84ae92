"""bfloat16 weights laid out once as oneDNN multiplies them, for experts on a CPU.

oneDNN copies a weight into its own blocked layout at every product. For the few rows an expert gets while decoding,
that copy is most of the work; measured on one core with 41 experts of 768x1024 and 1024x384, in milliseconds:

                       8 tokens    2048 tokens
    F.grouped_mm         11.6         219
    packed once           7.7         217

Results have the same bits either way. A packed weight is opaque: it can be multiplied with, and nothing else.

Legend: R rows, L groups, N output columns, K inner size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.gemm.grouped_torch import SMALL_WEIGHT, row_spans

FEWEST_ROWS = 4  # of one product

PackedWeights = tuple[Tensor, ...]  # one for each group


def can_pack(weights_LNK: Tensor) -> bool:
    """Whether packing these would help: bfloat16 on a CPU whose oneDNN multiplies it, above the size at which a copy of
    the weight a row is faster still (`grouped_torch`)."""
    if weights_LNK.dtype != torch.bfloat16 or weights_LNK.device.type != "cpu":
        return False
    if weights_LNK[0].numel() <= SMALL_WEIGHT or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weights_LNK: Tensor) -> PackedWeights:
    """[L, N, K] -> L opaque tensors of as many bytes."""
    return tuple(torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous()) for weight_NK in weights_LNK.detach())


def packed_matmul(rows_RK: Tensor, weights: PackedWeights, ends_L: Tensor) -> Tensor:
    """rows[start:end] @ weights[l]^T for every group l -> [R, N] bfloat16; ends_L int32 [L] end at R, above 0.

    A group of fewer than 4 rows reads on into the next group's: 4 rows keep more loads of the weight in flight, and
    take a tenth to a fifth less time than 1 or 2 where it comes from memory.
    """
    multiply = torch.ops.mkldnn._linear_pointwise.default
    spans = row_spans(ends_L)
    if spans[-1][2] - spans[-1][1] < FEWEST_ROWS:
        rows_RK = F.pad(rows_RK, (0, 0, 0, FEWEST_ROWS - 1))
    out = []
    for group, start, end in spans:
        x_RK = rows_RK[start : max(end, start + FEWEST_ROWS)]
        out.append(multiply(x_RK, weights[group], None, "none", [], "")[: end - start])
    return torch.cat(out)
