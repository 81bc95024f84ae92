# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The selection of experts as one kernel, and the same in torch operations, which is the specification.

    partials --sum over S--> logits --> scores --+ bias--> keys --group limit--> keys or -inf --K largest--> ids
                                          |                                                                   |
                                          +--> those of the selected --> weights              slots, load <---+

The logits may come as S partial sums over chunks of the inner size, as `router_partials` gives them; logits themselves
are S = 1. A register can not be indexed, so where many experts are selected from at once, the weights are computed anew
from the logits of those selected.

Where fewer than K experts can be selected, the tail of the row is id -1 with weight 0, so that a NaN row is a row
without experts rather than one with duplicate or out-of-range ids.

Rejected: `torch.topk` for the final selection (among ties it takes any); float atomics (the load counts are integers,
so their order does not show).

The kernel lays a row out as G_PAD groups of N_PAD places, powers of two, so that any E and G fit; places rise with the
expert id, so the lowest place among ties is the lowest id:

    E=6, G=2:   place  0 1 2 3 | 4 5 6 7
                expert 0 1 2 . | 3 4 5 .      '.': key -inf

Legend: T tokens on this rank, E logical experts, K experts per token, S chunks of the inner size, G groups of N
experts, X most replicas.
"""

from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.routing.checks import PlacementTables
from crossdock.routing.keys_kernel import (
    KEY_CAP,
    clamp_finite,
    keep_groups,
    limit_groups,
    score_of,
    selection_keys,
    sum_in_halves,
    sum_of_chunks,
    sum_of_few,
)
from crossdock.routing.pick_kernel import CODES_FROM, pick_by_code, pick_in_rounds, pick_ref
from crossdock.routing.rule import Rule
from crossdock.routing.scores import RENORM_EPSILON, finish_weights, scores_of

Picked = tuple[Tensor, Tensor, Tensor | None]  # ids_TK, weights_TK, slots_TK as in `Routing`, without gradient
MANY_ROWS = 1024  # from which instructions count and not latencies, as there is always another row to work on


def select_ref(
    logits_TE: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    placement_tables: PlacementTables | None,
    load_E: Tensor | None,
) -> Picked:
    """Selection in torch operations, on any device."""
    scores_TE = scores_of(logits_TE, rule.score)
    keys_TE = selection_keys(logits_TE, scores_TE, rule.score, bias_E, valid_T)
    if rule.limits_groups:
        keys_TE = limit_groups(keys_TE, rule)
    choice_TK = pick_ref(keys_TE, rule.top_k)
    taken_TK, at_TK = choice_TK >= 0, choice_TK.clamp(min=0)
    weights_TK = finish_weights(scores_TE.gather(1, at_TK), taken_TK, rule)
    slots_TK = None
    if placement_tables is not None:
        slots_EX, count_E = placement_tables
        row_T1 = torch.arange(len(at_TK), device=at_TK.device)[:, None]
        slots_TK = torch.where(taken_TK, slots_EX[at_TK, row_T1 % count_E[at_TK]], -1)
    if load_E is not None:
        load_E.scatter_add_(0, at_TK.flatten(), taken_TK.flatten().long())
    return choice_TK, weights_TK, slots_TK


@triton.jit
def select_kernel(
    partials,
    bias,
    valid,
    slots,
    replica_count,
    load,
    ids_out,
    weights_out,
    slots_out,
    T,
    scale,
    X,
    S: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    CAP: tl.constexpr,
    BY_CODE: tl.constexpr,  # needs ROWS = 1
    ROWS: tl.constexpr,
    LOG_G: tl.constexpr,
    LOG_N: tl.constexpr,
    LOG_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS rows a program. bias, valid, load, and (slots, replica_count, slots_out) together may each be None."""
    NEVER: tl.constexpr = float("-inf")
    N: tl.constexpr = E // G
    N_PAD: tl.constexpr = 1 << LOG_N
    P: tl.constexpr = 1 << (LOG_G + LOG_N)
    K_PAD: tl.constexpr = 1 << LOG_K
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, P)
    expert = (place // N_PAD) * N + place % N_PAD
    real = (place // N_PAD < G) & (place % N_PAD < N)
    of_row = row[:, None] * E
    x = sum_of_chunks(partials, of_row + expert[None, :], (row < T)[:, None] & real[None, :], T * E, S, STAGES)
    selectable = (x == x) & real[None, :]
    if SCORE == "softmax":
        finite = tl.where(selectable, clamp_finite(x), NEVER)
        top = tl.max(finite, axis=1)
        top = tl.where(top > NEVER, top, 0.0)
        score = tl.exp(finite - top[:, None])
        total = sum_in_halves(score, ROWS, P, LOG_G + LOG_N)
        score = score / total[:, None]
        lives = tl.max(tl.where(selectable & (x > NEVER), 1, 0), axis=1) > 0
        selectable = selectable & lives[:, None]
    else:
        score = score_of(x, SCORE)
    key = score
    if bias is not None:
        b = tl.load(bias + expert, mask=real, other=0.0)[None, :]
        key = key + b
        selectable = selectable & (b == b)
    if valid is not None:
        selectable = selectable & (tl.load(valid + row, mask=row < T, other=0) != 0)[:, None]
    key = tl.where(selectable, tl.minimum(key, CAP), NEVER)
    if TOP_GROUPS < G:
        key = keep_groups(key, ROWS, N, G, TOP_GROUPS, 1 << LOG_G, N_PAD)

    choice = tl.arange(0, K_PAD)
    if BY_CODE:
        at = pick_by_code(tl.reshape(key, [P]), P, LOG_G + LOG_N, K, K_PAD)[None, :]
        picked = sum_of_few(partials, of_row + (at // N_PAD) * N + at % N_PAD, at >= 0, T * E, S)
        if SCORE == "softmax":
            weight = tl.exp(clamp_finite(picked) - top[:, None]) / total[:, None]
        else:
            weight = score_of(picked, SCORE)
    else:
        at, weight = pick_in_rounds(key, score, ROWS, P, K, K_PAD)
    taken = at >= 0
    ids = tl.where(taken, (at // N_PAD) * N + at % N_PAD, -1)
    weight = tl.where(taken, weight, 0.0)
    if RENORMALIZE:
        weight = weight / (sum_in_halves(weight, ROWS, K_PAD, LOG_K) + EPSILON)[:, None]
    out = row[:, None] * K + choice[None, :]
    stored = (row < T)[:, None] & (choice < K)[None, :]
    tl.store(ids_out + out, ids.to(tl.int64), mask=stored)
    tl.store(weights_out + out, weight * scale, mask=stored)
    if slots is not None:
        count = tl.load(replica_count + ids, mask=taken, other=1)
        slot = tl.load(slots + ids.to(tl.int64) * X + row[:, None] % count, mask=taken, other=-1)
        tl.store(slots_out + out, slot, mask=stored)
    if load is not None:
        tl.atomic_add(load + ids, tl.full([ROWS, K_PAD], 1, tl.int64), mask=taken, sem="relaxed")


def constants(rule: Rule, rows: int, chunks: int) -> dict[str, Any]:
    """The kernel's constants. A program takes one row, or four where rows are many and short."""
    groups = rule.num_groups if rule.limits_groups else 1
    log_g, log_n = (groups - 1).bit_length(), (rule.num_experts // groups - 1).bit_length()
    places = 1 << (log_g + log_n)
    by_code = places >= CODES_FROM
    return {
        "S": chunks,
        "E": rule.num_experts,
        "K": rule.top_k,
        "G": groups,
        "TOP_GROUPS": min(rule.top_groups, groups),
        "SCORE": rule.score,
        "RENORMALIZE": rule.renormalize,
        "EPSILON": RENORM_EPSILON,
        "CAP": KEY_CAP,
        "BY_CODE": by_code,
        "ROWS": 1 if by_code or rows < MANY_ROWS else 4,
        "LOG_G": log_g,
        "LOG_N": log_n,
        "LOG_K": (rule.top_k - 1).bit_length(),
        "STAGES": 4 if places <= 1024 else 2,
    }


def warps_of(fixed: dict[str, Any], rows: int) -> int:
    """One warp, as rounds within a warp need no shared memory; four for a few long rows, which wait on each other."""
    return 4 if fixed["LOG_G"] + fixed["LOG_N"] >= 10 and rows < MANY_ROWS else 1


def select_triton(
    logits_TE: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    placement_tables: PlacementTables | None,
    load_E: Tensor | None,
) -> Picked:
    """As `select_ref`, in one launch."""
    return select_partials(logits_TE.contiguous()[None], rule, bias_E, valid_T, placement_tables, load_E)


def select_partials(
    partials_STE: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    placement_tables: PlacementTables | None,
    load_E: Tensor | None,
) -> Picked:
    """As `select_ref` of the logits that contiguous `partials_STE` add up to in ascending order, in one launch."""
    chunks, rows, _ = partials_STE.shape
    ids_TK = torch.empty(rows, rule.top_k, dtype=torch.int64, device=partials_STE.device)
    weights_TK = torch.empty(rows, rule.top_k, dtype=torch.float32, device=partials_STE.device)
    slots_EX, count_E = (t.contiguous() for t in placement_tables) if placement_tables is not None else (None, None)
    slots_TK = None if slots_EX is None else torch.empty_like(ids_TK)
    fixed = constants(rule, rows, chunks)
    if rows:
        select_kernel[(triton.cdiv(rows, fixed["ROWS"]),)](
            partials_STE,
            bias_E if bias_E is None else bias_E.contiguous(),
            valid_T if valid_T is None else valid_T.contiguous(),
            slots_EX,
            count_E,
            load_E,
            ids_TK,
            weights_TK,
            slots_TK,
            rows,
            float(rule.scale),
            0 if slots_EX is None else slots_EX.shape[1],
            num_warps=warps_of(fixed, rows),
            **fixed,
        )
    return ids_TK, weights_TK, slots_TK


def _spec(config: str, rule: Rule, rows: int, chunks: int, with_options: bool) -> KernelSpec:
    pointers = {"partials": "*fp32", "bias": "*fp32", "valid": "*i1", "slots": "*i64", "replica_count": "*i64"}
    pointers |= {"load": "*i64", "ids_out": "*i64", "weights_out": "*fp32", "slots_out": "*i64"}
    absent = [] if with_options else ["valid", "slots", "replica_count", "load", "slots_out"]
    fixed = constants(rule, rows, chunks)
    types = pointers | {"T": "i32", "scale": "fp32", "X": "i32"} | dict.fromkeys([*fixed, *absent], "constexpr")
    given = fixed | dict.fromkeys(absent)
    return KernelSpec("select_experts", select_kernel, config, types, given, num_warps=warps_of(fixed, rows))


AUDIT: list[KernelSpec] = [
    _spec("DeepSeek-V3, decode", Rule(256, 8, "sigmoid", 8, 4, True, 2.5), 16, 28, True),
    _spec("DeepSeek-V3, prefill", Rule(256, 8, "sigmoid", 8, 4, True, 2.5), 8192, 1, False),
    _spec("Qwen3, E=128 K=8, decode", Rule(128, 8, "softmax", 1, 1, True, 1.0), 16, 16, True),
    _spec("Qwen3, E=128 K=8, prefill", Rule(128, 8, "softmax", 1, 1, True, 1.0), 8192, 1, True),
    _spec("Kimi K2, E=384 K=8, decode", Rule(384, 8, "sigmoid", 1, 1, True, 2.827), 16, 28, True),
    _spec("E=512 K=10, softmax, prefill", Rule(512, 10, "softmax", 1, 1, True, 1.0), 8192, 1, True),
    _spec("E=896 K=16, sqrtsoftplus, decode", Rule(896, 16, "sqrtsoftplus", 1, 1, True, 1.0), 16, 28, True),
    _spec("E=896 K=16, sqrtsoftplus, prefill", Rule(896, 16, "sqrtsoftplus", 1, 1, True, 1.0), 8192, 1, True),
]
