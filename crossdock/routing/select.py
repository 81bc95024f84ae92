"""`select_experts`: from router logits to expert ids and weights, by DeepSeek-V3's rules with every edge case defined.

    logits --score fn--> scores --+ bias--> keys --group limit--> keys or -inf --K largest--> ids
                           |________________________________________________________________|--> weights

A key of -inf can not be selected: NaN logits, rejected groups, rows that are not valid, a bias of -inf. Where fewer
than K are left, the tail of the row is id -1 with weight 0, so that a NaN row is a row without experts rather than one
with duplicate or out-of-range ids. `torch.topk` was rejected for the final selection: among ties it takes any.

Legend: T tokens on this rank, E logical experts, K experts per token, G groups of experts, X most replicas.
"""

import torch
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.routing.checks import PlacementTables, check_operands, check_selection
from crossdock.routing.scores import LARGEST, Routing, Score, attach_gradient, finish_weights, scores_of

NEVER = float("-inf")
NEVER_0 = torch.tensor(NEVER)
NOBODY = torch.tensor(-1)


def select_experts(
    logits_TE: Tensor,
    *,
    top_k: int,
    score: Score = "sigmoid",
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    valid_T: Tensor | None = None,
    placement_tables: PlacementTables | None = None,
    load_E: Tensor | None = None,
    backend: Backend = "auto",
) -> Routing:
    """Selects `top_k` experts for each row of float32 logits [T, E]; the weights are differentiable.

    Source: DeepSeek-V3 report (arXiv:2412.19437), eqs. 12-16: scores, bias for selection only, weights of the unbiased
    scores. Config fields: num_experts_per_tok, scoring_func, e_score_correction_bias, n_group, topk_group,
    norm_topk_prob, routed_scaling_factor.

    bias_E: float32, added to the scores for selection only. -inf bans an expert.
    num_groups, top_groups: experts are taken from the `top_groups` of `num_groups` equal, consecutive groups with the
        largest sums of their two best keys (its one key for groups of one), ties to the lowest group.
    renormalize: weights / (their sum + 1e-20). scale: then multiplies them.
    valid_T: bool; rows that are False get no expert.
    placement_tables: (logical_to_physical_EX, replica_count_E), int64: asks for slot_ids_TK, the replica of expert e
        for row t being number t % replica_count[e].
    load_E: int64, to which the number of choices of each expert is added in place.

    A NaN logit is never selected; under softmax it counts as -inf. A softmax row without a logit above -inf selects
    nothing. +inf counts as the largest finite number.

    Raises ConfigError for options that describe no router and for tensors of another shape, dtype or device.
    """
    check_operands(logits_TE, bias_E, valid_T, placement_tables, load_E)
    check_selection(logits_TE.shape[1], top_k, score, num_groups, top_groups)
    select = select_experts_ref
    resolve_backend(backend, logits_TE.device)
    return select(
        logits_TE,
        top_k=top_k,
        score=score,
        bias_E=bias_E,
        num_groups=num_groups,
        top_groups=top_groups,
        renormalize=renormalize,
        scale=scale,
        valid_T=valid_T,
        placement_tables=placement_tables,
        load_E=load_E,
    )


def select_experts_ref(
    logits_TE: Tensor,
    *,
    top_k: int,
    score: Score = "sigmoid",
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    valid_T: Tensor | None = None,
    placement_tables: PlacementTables | None = None,
    load_E: Tensor | None = None,
) -> Routing:
    """`select_experts` in torch operations: the specification, and the path for tensors on a CPU."""
    with torch.no_grad():
        scores_TE = scores_of(logits_TE, score)
        keys_TE = _selection_keys(logits_TE, scores_TE, score, bias_E, valid_T)
        if top_groups < num_groups:
            keys_TE = _limit_groups(keys_TE, num_groups, top_groups)
        ordered = torch.sort(keys_TE, dim=-1, descending=True, stable=True)
        at_TK = ordered.indices[:, :top_k]
        taken_TK = ordered.values[:, :top_k] > NEVER_0
        ids_TK = torch.where(taken_TK, at_TK, NOBODY)
        weights_TK = finish_weights(scores_TE.gather(1, at_TK), taken_TK, renormalize, scale)
        slots_TK = None if placement_tables is None else _slots(at_TK, taken_TK, placement_tables)
        if load_E is not None:
            load_E.scatter_add_(0, at_TK.flatten(), taken_TK.flatten().long())
    return Routing(ids_TK, attach_gradient(logits_TE, weights_TK, ids_TK, score, renormalize, scale), slots_TK)


def _selection_keys(
    logits_TE: Tensor, scores_TE: Tensor, score: Score, bias_E: Tensor | None, valid_T: Tensor | None
) -> Tensor:
    """Biased scores, -inf for what can not be selected; no NaN and no +inf."""
    keys_TE = scores_TE if bias_E is None else scores_TE + bias_E
    keys_TE = torch.nan_to_num(keys_TE, nan=NEVER, posinf=LARGEST, neginf=NEVER)
    if score == "softmax":
        row_lives_T1 = (logits_TE > NEVER_0).any(dim=-1, keepdim=True)  # NaN is not above -inf either
        keys_TE = torch.where(row_lives_T1 & ~logits_TE.isnan(), keys_TE, NEVER_0)
    return keys_TE if valid_T is None else keys_TE.masked_fill(~valid_T[:, None], NEVER)


def _limit_groups(keys_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """The keys with -inf in all but each row's `top_groups` best groups."""
    keys_TGN = keys_TE.view(keys_TE.shape[0], num_groups, keys_TE.shape[1] // num_groups)
    best_TG = keys_TGN.topk(min(2, keys_TGN.shape[2])).values.sum(dim=-1)
    rejected_TR = torch.sort(best_TG, dim=-1, descending=True, stable=True).indices[:, top_groups:]
    penalty_TG = torch.zeros_like(best_TG).scatter_(1, rejected_TR, NEVER)
    return (keys_TGN + penalty_TG.unsqueeze(2)).flatten(1)


def _slots(at_TK: Tensor, taken_TK: Tensor, placement_tables: PlacementTables) -> Tensor:
    """Physical slots of the chosen experts, replicas taken in turn by row."""
    slots_EX, count_E = placement_tables
    row_T = torch.arange(at_TK.shape[0], device=at_TK.device)
    return torch.where(taken_TK, slots_EX[at_TK, row_T[:, None] % count_E[at_TK]], NOBODY)
