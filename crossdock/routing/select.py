"""`select_experts`: from router logits to expert ids and weights, by DeepSeek-V3's rules with every edge case defined.

Legend: T tokens on this rank, E logical experts, K experts per token, X most replicas of any expert.
"""

from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.routing.checks import PlacementTables, check_logits, check_options
from crossdock.routing.rule import Routing, Rule, Score, rule_of
from crossdock.routing.scores import attach_gradient
from crossdock.routing.select_cpu import select_cpu
from crossdock.routing.select_kernel import select_ref, select_triton


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
        largest sums of their two best biased scores (its one for groups of one), ties to the lowest group.
    renormalize: weights / (their sum + 1e-20). scale: then multiplies them.
    valid_T: bool; rows that are False get no expert.
    placement_tables: (logical_to_physical_EX, replica_count_E), int64: asks for slot_ids_TK, the replica of expert e
        for row t being number t % replica_count[e].
    load_E: int64, to which the number of choices of each expert is added in place.

    A NaN logit is never selected; under softmax it counts as -inf. A softmax row without a logit above -inf selects
    nothing. +inf counts as the largest finite number. Where fewer than `top_k` can be selected, the row's tail has id
    -1 and weight 0.

    Raises ConfigError for options that describe no router and for tensors of another shape, dtype or device.
    """
    check_logits(logits_TE)
    rows, experts = logits_TE.shape
    check_options(rows, experts, logits_TE.device, bias_E, valid_T, placement_tables, load_E)
    rule = rule_of(experts, top_k, score, num_groups, top_groups, renormalize, scale)
    return route(logits_TE, rule, bias_E, valid_T, placement_tables, load_E, backend)


def route(
    logits_TE: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    placement_tables: PlacementTables | None,
    load_E: Tensor | None,
    backend: Backend,
) -> Routing:
    """`select_experts` of arguments already checked."""
    if resolve_backend(backend, logits_TE.device) == "triton":
        select = select_triton
    else:
        select = select_cpu if logits_TE.device.type == "cpu" else select_ref
    ids_TK, weights_TK, slots_TK = select(logits_TE.detach(), rule, bias_E, valid_T, placement_tables, load_E)
    return Routing(ids_TK, attach_gradient(logits_TE, weights_TK, ids_TK, rule), slots_TK)


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
    """`select_experts` in torch operations, on any device: the specification."""
    check_logits(logits_TE)
    rows, experts = logits_TE.shape
    check_options(rows, experts, logits_TE.device, bias_E, valid_T, placement_tables, load_E)
    rule = rule_of(experts, top_k, score, num_groups, top_groups, renormalize, scale)
    ids_TK, weights_TK, slots_TK = select_ref(logits_TE.detach(), rule, bias_E, valid_T, placement_tables, load_E)
    return Routing(ids_TK, attach_gradient(logits_TE, weights_TK, ids_TK, rule), slots_TK)
