# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The selection of experts as one kernel, and the same in torch operations, which is the specification.

    logits --score fn--> scores --+ bias--> keys --group limit--> keys or -inf --K largest--> ids --> slots, load
                           |________________________________________________________________|--> weights

A key of -inf can not be selected: NaN logits, rejected groups, rows that are not valid, a bias of -inf. Where fewer
than K are left, the tail of the row is id -1 with weight 0, so that a NaN row is a row without experts rather than one
with duplicate or out-of-range ids. Keys are capped at KEY_CAP, so that no sum of two overflows or turns NaN.

Rejected: `torch.topk` for the final selection (among ties it takes any); a sort in the kernel (K argmax rounds move
less for K << E); float atomics (the load counts are integers, so their order does not show).

The kernel lays a row out as G_PAD groups of N_PAD places, powers of two, so that any E and G fit; places rise with the
expert id, so the lowest place among ties is the lowest id:

    E=6, G=2:   place  0 1 2 3 | 4 5 6 7
                expert 0 1 2 . | 3 4 5 .      '.': key -inf

Legend: T tokens on this rank, E logical experts, K experts per token, G groups of N experts, X most replicas.
"""

from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.routing.checks import PlacementTables
from crossdock.routing.rule import Rule, Score
from crossdock.routing.scores import RENORM_EPSILON, finish_weights, scores_of

Picked = tuple[Tensor, Tensor, Tensor | None]  # ids_TK, weights_TK, slots_TK as in `Routing`, without gradient
NEVER = float("-inf")
KEY_CAP = 1e30
MANY_ROWS = 1024  # from which a program takes several rows


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
    ordered = torch.sort(keys_TE, dim=-1, descending=True, stable=True)
    at_TK = ordered.indices[:, : rule.top_k]
    taken_TK = ordered.values[:, : rule.top_k] > NEVER
    weights_TK = finish_weights(scores_TE.gather(1, at_TK), taken_TK, rule)
    slots_TK = None
    if placement_tables is not None:
        slots_EX, count_E = placement_tables
        row_T1 = torch.arange(len(at_TK), device=at_TK.device)[:, None]
        slots_TK = torch.where(taken_TK, slots_EX[at_TK, row_T1 % count_E[at_TK]], -1)
    if load_E is not None:
        load_E.scatter_add_(0, at_TK.flatten(), taken_TK.flatten().long())
    return torch.where(taken_TK, at_TK, -1), weights_TK, slots_TK


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
def _score(x, SCORE: tl.constexpr):
    """sigmoid or sqrtsoftplus; the latter's log(1 + e) keeps its digits where e is small."""
    if SCORE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.sqrt(tl.where(x > 20.0, tl.minimum(x, 3.4028234663852886e38), log1p))


@triton.jit
def select_kernel(
    logits,
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
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    N_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
):
    """ROWS rows a program. bias, valid, load, and (slots, replica_count, slots_out) together may each be None."""
    NEVER: tl.constexpr = float("-inf")
    N: tl.constexpr = E // G
    P: tl.constexpr = G_PAD * N_PAD
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, P)
    expert = (place // N_PAD) * N + place % N_PAD
    real = (place // N_PAD < G) & (place % N_PAD < N)
    x = tl.load(logits + row[:, None] * E + expert[None, :], mask=(row < T)[:, None] & real[None, :], other=NEVER)
    selectable = (x == x) & real[None, :]
    if SCORE == "softmax":
        finite = tl.where(selectable, tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38), NEVER)
        top = tl.max(finite, axis=1)
        top = tl.where(top > NEVER, top, 0.0)
        score = tl.exp(finite - top[:, None])
        total = tl.sum(score, axis=1)
        score = score / total[:, None]
        lives = tl.max(tl.where(selectable & (x > NEVER), 1, 0), axis=1) > 0
        selectable = selectable & lives[:, None]
    else:
        score = _score(x, SCORE)
    key = score
    if bias is not None:
        b = tl.load(bias + expert, mask=real, other=0.0)[None, :]
        key = key + b
        selectable = selectable & (b == b)
    if valid is not None:
        selectable = selectable & (tl.load(valid + row, mask=row < T, other=0) != 0)[:, None]
    key = tl.where(selectable, tl.minimum(key, CAP), NEVER)

    if TOP_GROUPS < G:
        group = tl.arange(0, G_PAD)
        in_groups = tl.reshape(key, [ROWS, G_PAD, N_PAD])
        best, first = tl.max(in_groups, axis=2, return_indices=True, return_indices_tie_break_left=True)
        if N > 1:  # the second of a pair of ties is the same value, so it goes by place and not by value
            others = tl.where(tl.arange(0, N_PAD)[None, None, :] == first[:, :, None], NEVER, in_groups)
            best += tl.max(others, axis=2)
        # A group may itself score -inf, so the ones still open are told by `is_open`, not by their score.
        kept = tl.zeros([ROWS, G_PAD], tl.int32)
        for _ in range(TOP_GROUPS):
            is_open = (kept == 0) & (group < G)[None, :]
            open_best = tl.where(is_open, best, NEVER)
            rank = tl.where(is_open & (open_best == tl.max(open_best, axis=1)[:, None]), group[None, :], G_PAD)
            kept = tl.where(group[None, :] == tl.min(rank, axis=1)[:, None], 1, kept)
        key = tl.reshape(tl.where(kept[:, :, None] > 0, in_groups, NEVER), [ROWS, P])

    choice = tl.arange(0, K_PAD)
    ids = tl.full([ROWS, K_PAD], -1, tl.int32)
    for k in range(K):
        top_key, at = tl.max(key, axis=1, return_indices=True, return_indices_tie_break_left=True)
        chosen = (at // N_PAD) * N + at % N_PAD
        taken = (choice[None, :] == k) & (top_key > NEVER)[:, None]
        ids = tl.where(taken, chosen[:, None], ids)
        key = tl.where(place[None, :] == at[:, None], NEVER, key)

    taken = ids >= 0
    picked = tl.load(logits + row[:, None] * E + ids, mask=taken, other=0.0)
    if SCORE == "softmax":
        picked = tl.minimum(tl.maximum(picked, -3.4028234663852886e38), 3.4028234663852886e38)
        weight = tl.exp(picked - top[:, None]) / total[:, None]
    else:
        weight = _score(picked, SCORE)
    weight = tl.where(taken, weight, 0.0)
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, axis=1) + EPSILON)[:, None]
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


def _power_of_2_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


def constants(rule: Rule, rows: int) -> dict[str, Any]:
    """The kernel's constants: one row a program while rows are few, then as many as keep it to 512 places."""
    groups = rule.num_groups if rule.limits_groups else 1
    groups_pad, group_pad = _power_of_2_from(groups), _power_of_2_from(rule.num_experts // groups)
    return {
        "E": rule.num_experts,
        "K": rule.top_k,
        "G": groups,
        "TOP_GROUPS": min(rule.top_groups, groups),
        "SCORE": rule.score,
        "RENORMALIZE": rule.renormalize,
        "EPSILON": RENORM_EPSILON,
        "CAP": KEY_CAP,
        "ROWS": max(1, min(4, 512 // (groups_pad * group_pad))) if rows >= MANY_ROWS else 1,
        "G_PAD": groups_pad,
        "N_PAD": group_pad,
        "K_PAD": _power_of_2_from(rule.top_k),
    }


def select_triton(
    logits_TE: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    placement_tables: PlacementTables | None,
    load_E: Tensor | None,
) -> Picked:
    """As `select_ref`, in one launch."""
    rows = logits_TE.shape[0]
    ids_TK = torch.empty(rows, rule.top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(rows, rule.top_k, dtype=torch.float32, device=logits_TE.device)
    slots_EX, count_E = (t.contiguous() for t in placement_tables) if placement_tables is not None else (None, None)
    slots_TK = None if slots_EX is None else torch.empty_like(ids_TK)
    fixed = constants(rule, rows)
    if rows:
        select_kernel[(triton.cdiv(rows, fixed["ROWS"]),)](
            logits_TE.contiguous(),
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
            num_warps=1,
            **fixed,
        )
    return ids_TK, weights_TK, slots_TK


def _spec(config: str, rule: Rule, rows: int, with_options: bool) -> KernelSpec:
    pointers = {"logits": "*fp32", "bias": "*fp32", "valid": "*i1", "slots": "*i64", "replica_count": "*i64"}
    pointers |= {"load": "*i64", "ids_out": "*i64", "weights_out": "*fp32", "slots_out": "*i64"}
    absent = [] if with_options else ["valid", "slots", "replica_count", "load", "slots_out"]
    fixed = constants(rule, rows)
    types = pointers | {"T": "i32", "scale": "fp32", "X": "i32"} | dict.fromkeys([*fixed, *absent], "constexpr")
    return KernelSpec("select_experts", select_kernel, config, types, fixed | dict.fromkeys(absent), num_warps=1)


AUDIT: list[KernelSpec] = [
    _spec("DeepSeek-V3, decode", Rule(256, 8, "sigmoid", 8, 4, True, 2.5), rows=16, with_options=True),
    _spec("DeepSeek-V3, prefill", Rule(256, 8, "sigmoid", 8, 4, True, 2.5), rows=8192, with_options=False),
    _spec("Qwen3, E=128 K=8", Rule(128, 8, "softmax", 1, 1, True, 1.0), rows=8192, with_options=True),
    _spec("E=896 K=16, sqrtsoftplus", Rule(896, 16, "sqrtsoftplus", 1, 1, True, 1.0), rows=16, with_options=True),
]
