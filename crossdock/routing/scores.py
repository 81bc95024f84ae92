"""The differentiable half of routing: scores of logits, and weights of experts already selected.

Selection itself has no gradient, so every backend selects without autograd, and one node (`attach_gradient`) recomputes
the weights from the logits at the selected ids when gradients are asked for. The forward pass then runs the same code
in training and in inference, and a kernel needs no backward kernel.

sigmoid and sqrtsoftplus go through float64: torch's vectorised float32 loops and their scalar tails differ in the last
bit, so equal logits would not tie and a row's scores would depend on its place in the batch. Padding to whole vectors
was rejected, because the split over threads makes tails of its own.

Legend: T tokens on this rank, E logical experts, K experts per token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.routing.rule import Rule, Score

LARGEST = torch.finfo(torch.float32).max
RENORM_EPSILON = 1e-20  # what DeepSeek-V3's code adds to the sum before dividing by it


def scores_of(logits_TE: Tensor, score: Score) -> Tensor:
    """Unbiased scores, float32 of float32 logits [T, E]. NaN stays NaN, except under softmax, where it scores 0.

    Infinities give finite scores and a row without any live logit gives no NaN, so that gradients stay finite too.
    """
    if score == "sigmoid":
        return torch.sigmoid(logits_TE.double()).float()
    if score == "softmax":
        return torch.softmax(torch.nan_to_num(logits_TE, nan=-LARGEST), dim=-1)
    soft_TE = F.softplus(logits_TE.double().clamp(max=LARGEST))
    positive_TE = soft_TE > 0
    return torch.where(positive_TE, torch.where(positive_TE, soft_TE, 1.0).sqrt(), soft_TE).float()


def finish_weights(picked_TK: Tensor, taken_TK: Tensor, rule: Rule) -> Tensor:
    """Scores at the selected ids -> weights: 0 where not `taken`, divided by the row's sum (eq. 13), times scale."""
    picked_TK = torch.where(taken_TK, picked_TK, 0.0)
    if rule.renormalize:
        picked_TK = picked_TK / (picked_TK.sum(dim=-1, keepdim=True) + RENORM_EPSILON)
    return picked_TK * rule.scale


def weights_at(logits_TE: Tensor, ids_TK: Tensor, rule: Rule) -> Tensor:
    """The weights [T, K] of experts `ids_TK` (-1: none) as a differentiable function of the logits.

    Only softmax looks at logits that were not selected, so a NaN elsewhere in the row does not reach the gradient.
    """
    taken_TK = ids_TK >= 0
    at_TK = ids_TK.clamp(min=0)
    if rule.score == "softmax":
        picked_TK = scores_of(logits_TE, rule.score).gather(1, at_TK)
    else:
        picked_TK = scores_of(torch.where(taken_TK, logits_TE.gather(1, at_TK), 0.0), rule.score)
    return finish_weights(picked_TK, taken_TK, rule)


class _Recompute(torch.autograd.Function):
    """Identity on the weights; its backward differentiates `weights_at`."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor, rule: Rule) -> Tensor:
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.rule = rule
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> Any:
        logits_TE, ids_TK = ctx.saved_tensors
        with torch.enable_grad():
            leaf_TE = logits_TE.detach().requires_grad_()
            (grad_TE,) = torch.autograd.grad(weights_at(leaf_TE, ids_TK, ctx.rule), leaf_TE, grad_TK)
        return grad_TE, None, None, None


def attach_gradient(logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor, rule: Rule) -> Tensor:
    """`weights_TK`, with the gradient of `weights_at` where autograd wants one."""
    if not (logits_TE.requires_grad and torch.is_grad_enabled()):
        return weights_TK
    out: Tensor = _Recompute.apply(logits_TE, weights_TK, ids_TK, rule)  # type: ignore[no-untyped-call]
    return out
