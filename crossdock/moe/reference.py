"""What an MoE layer computes, one token at a time in float64: the specification that the fast layer is held to.

Legend: T tokens, D hidden, E logical experts, F expert inner size. Shares no code with the layer.
"""

import torch
from torch import Tensor

from crossdock.moe.config import MoEConfig


def moe_ref(
    config: MoEConfig,
    x_TD: Tensor,
    router_ED: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    bias_E: Tensor | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    shared_gate_1D: Tensor | None = None,
) -> Tensor:
    """The layer's output in float64, differentiable in every float64 tensor given (others are converted).

    gate_up [E, 2F, D] has gate rows first. shared: (gate_up, down) of the shared expert.
    """
    router_ED, gate_up_E2FD, down_EDF = (t.double() for t in (router_ED, gate_up_E2FD, down_EDF))
    rows = []
    for x_D in x_TD.double():
        y_D = torch.zeros_like(x_D)
        for expert, weight in select_ref(config, router_ED @ x_D, bias_E):
            y_D = y_D + weight * _swiglu_mlp(x_D, gate_up_E2FD[expert], down_EDF[expert])
        if shared is not None:
            shared_D = _swiglu_mlp(x_D, shared[0].double(), shared[1].double())
            y_D = y_D + (
                shared_D if shared_gate_1D is None else torch.sigmoid(shared_gate_1D.double() @ x_D) * shared_D
            )
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD.double()


def select_ref(config: MoEConfig, logits_E: Tensor, bias_E: Tensor | None = None) -> list[tuple[int, Tensor]]:
    """One token's (expert, weight) pairs by the rules of `MoEConfig`, ties to the lowest id."""
    match config.score:
        case "sigmoid":
            scores_E = torch.sigmoid(logits_E)
        case "softmax":
            scores_E = torch.softmax(logits_E, 0)
        case "sqrtsoftplus":
            scores_E = torch.sqrt(torch.nn.functional.softplus(logits_E))
    keys = (scores_E.detach() + (0 if bias_E is None else bias_E.double())).tolist()
    size = config.num_experts // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
    best = sorted(groups, key=lambda group: -sum(sorted((keys[e] for e in group), reverse=True)[:2]))
    allowed = sorted(e for group in best[: config.top_groups] for e in group)
    chosen = sorted(allowed, key=lambda e: -keys[e])[: config.top_k]
    total = sum(scores_E[e] for e in chosen) + 1e-20 if config.renormalize else 1.0
    return [(e, scores_E[e] / total * config.scale) for e in chosen]


def _swiglu_mlp(x_D: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    gate_F, up_F = (gate_up_2FD @ x_D).chunk(2)
    return down_DF @ (gate_F * torch.sigmoid(gate_F) * up_F)
