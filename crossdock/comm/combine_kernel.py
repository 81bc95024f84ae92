# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""A token's K results, weighted and added in the order of k, as one launch; another tensor is added where asked.

Products and sums are float32 and apart: fused multiply-adds are switched off, so that the same sums can be recomputed
anywhere, in torch operations too. What is added (shared experts' output) meets the sum after its rounding to the rows'
dtype, as it would in an operation of its own.

Legend: T tokens, D hidden, K experts per token, S rows in the order they were sent.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton

COLUMNS = 1024  # of one program
CACHED = 1 << 19  # values that a CPU works on at a time


def weighted_sum_ref(rows_SD: Tensor, weights_TK: Tensor | None, position_TK: Tensor, plus_TD: Tensor | None) -> Tensor:
    """y[t] = sum over k of weights[t, k] * rows[position[t, k]] (+ plus[t]) -> [T, D] in the rows' dtype.

    Weights of one where None. A position of S or more is no row: it adds nothing, even where its weight is NaN. Sums
    are float32, float64 for float64 rows. The specification, and the torch backend: what is no row costs nothing.
    """
    here_TK = position_TK.cpu().numpy() < len(rows_SD)
    y_TD = rows_SD.new_empty(len(position_TK), rows_SD.shape[1])
    if here_TK.all():
        _sums(rows_SD, weights_TK, position_TK, y_TD)
    else:
        y_TD = _ragged(rows_SD, weights_TK, position_TK, here_TK, y_TD)
    return y_TD if plus_TD is None else y_TD + plus_TD


def _ragged(
    rows_SD: Tensor,
    weights_TK: Tensor | None,
    position_TK: Tensor,
    here_TK: npt.NDArray[np.bool_],
    room_TD: Tensor,
) -> Tensor:
    """The same where some positions are no row: tokens with equally many rows are added up together."""
    (tokens, top_k), device = position_TK.shape, position_TK.device
    count_T = here_TK.sum(1)
    order_T = count_T.argsort(kind="stable")
    at_C, k_C = here_TK[order_T].nonzero()
    choice_C = torch.from_numpy(order_T[at_C] * top_k + k_C).to(device)
    position_C = position_TK.reshape(-1).index_select(0, choice_C)
    weights_C = None if weights_TK is None else weights_TK.reshape(-1).index_select(0, choice_C)
    token = choice = 0
    for count, alike in enumerate(np.bincount(count_T).tolist()):
        some, here = slice(token, token + alike), slice(choice, choice + alike * count)
        token, choice = some.stop, here.stop
        if count == 0:
            room_TD[some] = 0.0
        elif alike:
            weights = None if weights_C is None else weights_C[here].view(alike, count)
            _sums(rows_SD, weights, position_C[here].view(alike, count), room_TD[some])
    place_T = np.empty_like(order_T)
    place_T[order_T] = np.arange(tokens)
    return room_TD.index_select(0, torch.from_numpy(place_T).to(device))


def _sums(rows_SD: Tensor, weights_TK: Tensor | None, position_TK: Tensor, y_TD: Tensor) -> None:
    """The same where each position is a row, in the order of k, into y_TD.

    On a CPU the terms of a few tokens at a time stay in the cache, which makes 2048 tokens of 8 x 1024 six times as
    fast.
    """
    wide = torch.promote_types(rows_SD.dtype, torch.float32)
    (tokens, top_k), size_D = position_TK.shape, rows_SD.shape[1]
    portion = tokens if rows_SD.device.type != "cpu" else max(1, CACHED // (top_k * max(1, size_D)))
    for first in range(0, tokens, max(portion, 1)):
        some = slice(first, first + portion)
        places_TK = position_TK[some]
        terms_TKD = rows_SD.index_select(0, places_TK.reshape(-1)).to(wide).view(*places_TK.shape, size_D)
        if weights_TK is not None:
            terms_TKD.mul_(weights_TK[some].to(wide).unsqueeze(-1))
        total_TD, *others = terms_TKD.unbind(1)
        for term_TD in others:
            total_TD += term_TD
        y_TD[some] = total_TD


@triton.jit
def weighted_sum_kernel(
    rows_ptr,  # [S, D] contiguous
    weights_ptr,  # [T, K] float32 contiguous, or None
    position_ptr,  # [T, K] int32 or int64, contiguous
    plus_ptr,  # [T, D] contiguous, or None
    out_ptr,  # [T, D] contiguous
    S,
    D,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(position_ptr + token * K + k).to(tl.int64)
        there = row < S
        term = tl.load(rows_ptr + row * D + col, mask=(col < D) & there, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            term = term * tl.where(there, tl.load(weights_ptr + token * K + k), 0.0)
        total = term if k == 0 else total + term
    y = total.to(out_ptr.dtype.element_ty)
    if plus_ptr is not None:
        plus = tl.load(plus_ptr + token * D + col, mask=col < D, other=0.0)
        y = (y.to(tl.float32) + plus.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * D + col, y, mask=col < D)


def weighted_sum_triton(
    rows_SD: Tensor, weights_TK: Tensor | None, position_TK: Tensor, plus_TD: Tensor | None
) -> Tensor:
    """`weighted_sum_ref` in one launch, for rows of at most 32 bits."""
    (tokens, top_k), (count, size_D) = position_TK.shape, rows_SD.shape
    out_TD = torch.empty((tokens, size_D), dtype=rows_SD.dtype, device=rows_SD.device)
    if out_TD.numel():
        weighted_sum_kernel[(tokens, -(-size_D // COLUMNS))](
            rows_SD.contiguous(),
            None if weights_TK is None else weights_TK.float().contiguous(),
            position_TK.contiguous(),
            None if plus_TD is None else plus_TD.contiguous(),
            out_TD,
            count,
            size_D,
            K=top_k,
            COLUMNS=COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out_TD


def _audit(config: str, plus: bool) -> KernelSpec:
    absent = {} if plus else {"plus_ptr": None}
    constexprs = absent | {"K": 8, "COLUMNS": COLUMNS}
    types = {"rows_ptr": "*bf16", "weights_ptr": "*fp32", "position_ptr": "*i32", "plus_ptr": "*bf16"}
    types |= {"out_ptr": "*bf16", "S": "i32", "D": "i32"}
    signature = types | dict.fromkeys(constexprs, "constexpr")
    return KernelSpec("weighted_sum", weighted_sum_kernel, config, signature, constexprs)


AUDIT = [_audit("bf16, K=8", plus=False), _audit("bf16, K=8, with shared experts' output", plus=True)]
