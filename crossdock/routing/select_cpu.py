"""Selection for tensors on a CPU, in numpy: the decode path's.

For a few rows the cost is the number of calls, and a numpy call costs a third of a torch call: with 16 experts in 4
groups one row takes about 44 us here and 74 us in `select_ref`. The scores are the reference's own, so both
select the same experts, whatever the rounding.

Legend: T tokens on this rank, E logical experts, K experts per token, G groups of N experts.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossdock.routing.checks import PlacementTables
from crossdock.routing.keys_kernel import KEY_CAP, NEVER
from crossdock.routing.rule import Rule
from crossdock.routing.scores import RENORM_EPSILON, scores_of
from crossdock.routing.select_kernel import Picked

Array = np.ndarray[Any, Any]


def select_cpu(
    logits_TE: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    placement_tables: PlacementTables | None,
    load_E: Tensor | None,
) -> Picked:
    """As `select_ref`."""
    scores_TE = scores_of(logits_TE, rule.score).numpy()
    keys_TE = scores_TE if bias_E is None else np.minimum(scores_TE + bias_E.numpy(), KEY_CAP)
    keys_TE = np.fmax(keys_TE, NEVER)  # takes -inf over NaN
    if rule.score == "softmax":
        raw_TE = logits_TE.numpy()
        keys_TE = np.where((raw_TE > NEVER).any(axis=1, keepdims=True) & ~np.isnan(raw_TE), keys_TE, NEVER)
    if valid_T is not None:
        keys_TE = np.where(valid_T.numpy()[:, None], keys_TE, NEVER)
    row_T1 = np.arange(len(keys_TE))[:, None]
    if rule.limits_groups:
        keys_TE = _limit_groups(keys_TE, row_T1, rule)
    at_TK = np.argsort(-keys_TE, axis=1, kind="stable")[:, : rule.top_k]
    taken_TK = keys_TE[row_T1, at_TK] > NEVER
    weights_TK = np.where(taken_TK, scores_TE[row_T1, at_TK], np.float32(0))
    if rule.renormalize:
        weights_TK = weights_TK / (np.add.reduce(weights_TK, axis=1, keepdims=True) + np.float32(RENORM_EPSILON))
    weights_TK = weights_TK * np.float32(rule.scale)
    if load_E is not None:
        load_E.numpy()[:] += np.bincount(at_TK[taken_TK], minlength=rule.num_experts)
    slots_TK = None
    if placement_tables is not None:
        slots_EX, count_E = (table.numpy() for table in placement_tables)
        slots_TK = torch.from_numpy(np.where(taken_TK, slots_EX[at_TK, row_T1 % count_E[at_TK]], -1))
    return torch.from_numpy(np.where(taken_TK, at_TK, -1)), torch.from_numpy(weights_TK), slots_TK


def _limit_groups(keys_TE: Array, row_T1: Array, rule: Rule) -> Array:
    """A copy of the keys with -inf in all but each row's `top_groups` best groups."""
    size = rule.num_experts // rule.num_groups
    keys_TGN = keys_TE.reshape(len(keys_TE), rule.num_groups, size).copy()
    best_TG = np.partition(keys_TGN, size - 2, axis=2)[:, :, -2:].sum(axis=2) if size > 1 else keys_TGN[:, :, 0]
    keys_TGN[row_T1, np.argsort(-best_TG, axis=1, kind="stable")[:, rule.top_groups :]] = NEVER
    return keys_TGN.reshape(keys_TE.shape)
