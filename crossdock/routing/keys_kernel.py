# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""From logits to keys, the numbers that experts are selected by: what the select kernel computes before it selects.

A key of -inf can not be selected: NaN logits, rows that are not valid, a bias of -inf. Keys are capped at KEY_CAP, so
that no sum of two overflows or turns NaN, and they are never -0.0: a score is never negative, and 0.0 + -0.0 is 0.0.

A sum over a row is taken in halves, axis after axis of length two. `tl.sum` over the whole axis would add in an order
that follows from the layout in registers, and so from how many rows a program has: a row's softmax and its
renormalised weights would have other bits in prefill than in decode.

Legend: T tokens on this rank, E logical experts, S chunks of the inner size, G groups of N experts.
"""

import torch
from torch import Tensor

from crossdock._triton import tl, triton
from crossdock.routing.rule import Rule, Score

NEVER = float("-inf")
KEY_CAP = 1e30


def selection_keys(
    logits_TE: Tensor, scores_TE: Tensor, score: Score, bias_E: Tensor | None, valid_T: Tensor | None
) -> Tensor:
    """Biased scores, -inf for what can not be selected; never NaN or +inf."""
    keys_TE = scores_TE if bias_E is None else scores_TE + bias_E
    keys_TE = torch.nan_to_num(keys_TE, nan=NEVER, posinf=KEY_CAP, neginf=NEVER).clamp(max=KEY_CAP)
    if score == "softmax":
        row_lives_T1 = (logits_TE > NEVER).any(dim=-1, keepdim=True)  # NaN is not above -inf either
        keys_TE = torch.where(row_lives_T1 & ~logits_TE.isnan(), keys_TE, NEVER)
    return keys_TE if valid_T is None else torch.where(valid_T[:, None], keys_TE, NEVER)


def limit_groups(keys_TE: Tensor, rule: Rule) -> Tensor:
    """The keys with -inf in all but each row's `top_groups` best groups, ties to the lowest group."""
    keys_TGN = keys_TE.reshape(len(keys_TE), rule.num_groups, rule.num_experts // rule.num_groups)
    best_TG = keys_TGN.topk(min(2, keys_TGN.shape[2])).values.sum(dim=-1)
    rejected_TR = torch.sort(best_TG, dim=-1, descending=True, stable=True).indices[:, rule.top_groups :]
    rejected_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, rejected_TR, True)
    return torch.where(rejected_TG[:, :, None], NEVER, keys_TGN).flatten(1)


@triton.jit
def sum_of_chunks(partials, at, mask, size, S: tl.constexpr, STAGES: tl.constexpr):
    """partials[0] + partials[1] + ..., in this order, at offsets `at`; `size` numbers in each of S chunks.

    For whole rows: a pipelined loop keeps 4 * (STAGES - 1) chunks on their way, however many registers a chunk takes.
    """
    if S == 1:
        return tl.load(partials + at, mask=mask, other=0.0)
    x = tl.zeros(at.shape, tl.float32)
    for s in tl.range(0, S, 4, num_stages=STAGES):
        chunk = partials + at + s * size
        x += tl.load(chunk, mask=mask, other=0.0)
        x += tl.load(chunk + size, mask=mask & (s + 1 < S), other=0.0)
        x += tl.load(chunk + 2 * size, mask=mask & (s + 2 < S), other=0.0)
        x += tl.load(chunk + 3 * size, mask=mask & (s + 3 < S), other=0.0)
    return x


@triton.jit
def sum_of_few(partials, at, mask, size, S: tl.constexpr):
    """As `sum_of_chunks` for a few numbers, all loads on their way at once."""
    x = tl.load(partials + at, mask=mask, other=0.0)
    for _ in tl.static_range(1, S):
        partials += size
        x += tl.load(partials + at, mask=mask, other=0.0)
    return x


@triton.jit
def score_of(x, SCORE: tl.constexpr):
    """sigmoid or sqrtsoftplus, which keeps its digits where e is small, and is more than nothing where e is zero."""
    if SCORE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    root = tl.sqrt(tl.where(x > 20.0, tl.minimum(x, 3.4028234663852886e38), log1p))
    return tl.where(x < -20.0, tl.exp(0.5 * x), root)


@triton.jit
def clamp_finite(x):
    """Infinities become the largest finite numbers."""
    return tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38)


@triton.jit
def sum_in_halves(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Sums [ROWS, WIDTH] -> [ROWS], neighbours first, in an order that the layout can not change. WIDTH = 2^LEVELS."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [ROWS, WIDTH >> (level + 1), 2]), axis=2)
    return tl.reshape(x, [ROWS])


@triton.jit
def keep_groups(
    key,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    G_PAD: tl.constexpr,
    N_PAD: tl.constexpr,
):
    """`limit_groups` of keys [ROWS, G_PAD * N_PAD], -inf where there is no expert."""
    NEVER: tl.constexpr = float("-inf")
    group = tl.arange(0, G_PAD)
    in_groups = tl.reshape(key, [ROWS, G_PAD, N_PAD])
    best = tl.max(in_groups, axis=2)
    if N > 1:  # the second of a pair of ties is the same value, which leaving out all that equals the best would lose
        is_best = in_groups == best[:, :, None]
        second = tl.max(tl.where(is_best, NEVER, in_groups), axis=2)
        best += tl.where(tl.sum(is_best.to(tl.int32), axis=2) > 1, best, second)
    # A group may itself score -inf, so ranks and flags tell groups apart, never their score.
    if G_PAD <= 16:
        ahead = (best[:, None, :] > best[:, :, None]) | (
            (best[:, None, :] == best[:, :, None]) & (group[None, None, :] < group[None, :, None])
        )
        rank = tl.sum((ahead & (group < G)[None, None, :]).to(tl.int32), axis=2)
        kept = ((rank < TOP_GROUPS) & (group < G)[None, :]).to(tl.int32)
    else:
        kept = tl.zeros([ROWS, G_PAD], tl.int32)
        for _ in range(TOP_GROUPS):
            is_open = (kept == 0) & (group < G)[None, :]
            open_best = tl.where(is_open, best, NEVER)
            first = tl.where(is_open & (open_best == tl.max(open_best, axis=1)[:, None]), group[None, :], G_PAD)
            kept = tl.where(group[None, :] == tl.min(first, axis=1)[:, None], 1, kept)
    return tl.reshape(tl.where(kept[:, :, None] > 0, in_groups, NEVER), [ROWS, G_PAD * N_PAD])
