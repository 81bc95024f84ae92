"""From measured expert load to a placement: replicate the hot experts, then pack replicas onto ranks.

Legend: N layers, E logical experts, P physical slots, X most replicas of any expert, W ranks (GPUs).

The inputs and outputs are those of DeepSeek's EPLB (`rebalance_experts`), and so is the plan: where the expert groups
divide over the nodes, groups are packed onto nodes first, so that a token's groups stay on few nodes; then experts are
replicated and packed inside each node. Two things differ: no rank gets two replicas of one expert unless there are more
replicas than ranks, and every result comes with a bound below which no placement can go.

>>> phy2log, log2phy, count = rebalance(torch.tensor([[90.0, 30.0, 20.0, 10.0]]), 6, 1, 1, 2)
>>> phy2log.tolist(), count.tolist()
([[0, 2, 1, 0, 1, 3]], [[2, 2, 1, 1]])
>>> print(balance_report(torch.tensor([[90.0, 30.0, 20.0, 10.0]]), phy2log, 2))
layer 0: busiest of 2 ranks 80.0, mean 75.0, balancedness 0.938; no placement of 6 slots can be below 75.0
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.errors import ConfigError


def rebalance(
    weight_NE: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Places `num_replicas` (P) physical experts so that the busiest GPU has little more than the mean load.

    weight_NE: load of each expert, any unit, at least 0. Hierarchical where num_nodes divides num_groups and a node has
    no more slots than one replica of each of its experts on each of its GPUs would fill, else global.
    Returns int64 tensors on the CPU: physical_to_logical [N, P], logical_to_physical [N, E, X] (-1 padded) and
    replica counts [N, E]. Raises ConfigError for sizes that do not divide or a load that is negative or not finite.
    """
    _check(weight_NE, num_replicas, num_groups, num_nodes, num_gpus)
    spare = num_replicas > weight_NE.shape[1] * (
        num_gpus // num_nodes
    )  # a node's slots outnumber what it may replicate
    if num_groups % num_nodes or spare:
        num_groups = num_nodes = 1  # global: one node that holds every GPU
    phy2log = [_place(loads, num_replicas, num_groups, num_nodes, num_gpus) for loads in weight_NE.double().tolist()]
    layers, experts = weight_NE.shape
    phy2log_NP = torch.tensor(phy2log, dtype=torch.int64).reshape(layers, num_replicas)
    count_NE = torch.zeros(layers, experts, dtype=torch.int64)
    count_NE.scatter_add_(1, phy2log_NP, torch.ones_like(phy2log_NP))
    log2phy_NEX = torch.full((layers, experts, int(count_NE.max()) if layers else 1), -1, dtype=torch.int64)
    for layer, slots in enumerate(phy2log):
        seen = [0] * experts
        for slot, expert in enumerate(slots):
            log2phy_NEX[layer, expert, seen[expert]] = slot
            seen[expert] += 1
    return phy2log_NP, log2phy_NEX, count_NE


def _check(weight_NE: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    if weight_NE.dim() != 2:
        raise ConfigError(f"weight must be [layers, experts], found shape {tuple(weight_NE.shape)}")
    experts = weight_NE.shape[1]
    if not bool(torch.isfinite(weight_NE).all()) or bool((weight_NE < 0).any()):
        raise ConfigError("weight must be finite and at least 0")
    if min(experts, num_groups, num_nodes, num_gpus) < 1:
        raise ConfigError("experts, num_groups, num_nodes and num_gpus must be at least 1")
    if num_replicas < experts:
        raise ConfigError(f"num_replicas {num_replicas} is less than the {experts} experts")
    for what, whole, part in (("num_replicas", num_replicas, num_gpus), ("num_gpus", num_gpus, num_nodes),
                              ("experts", experts, num_groups)):  # fmt: skip
        if whole % part:
            raise ConfigError(f"{what} {whole} does not divide by {part}")


def _place(loads: Sequence[float], slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """One layer: groups to nodes, then experts of a node to its slots."""
    size = len(loads) // groups
    group_load = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
    placed: list[int] = []
    for held in _pack(group_load, list(range(groups)), nodes):
        experts = sorted(g * size + i for g in held for i in range(size))
        replicas = _replicate([loads[e] for e in experts], slots // nodes, gpus // nodes)
        share = [loads[experts[i]] / replicas.count(i) for i in replicas]
        for rank in _pack(share, replicas, gpus // nodes):
            placed += [experts[replicas[item]] for item in rank]
    return placed


def _replicate(loads: Sequence[float], slots: int, packs: int) -> list[int]:
    """Gives each further slot to the expert whose replicas carry most; at most one a pack while that is possible."""
    count = [1] * len(loads)
    for _ in range(slots - len(loads)):
        below = [e for e in range(len(loads)) if count[e] < packs] or list(range(len(loads)))
        count[max(below, key=lambda e: (loads[e] / count[e], -count[e], -e))] += 1
    return [e for e, times in enumerate(count) for _ in range(times)]


def _pack(weights: Sequence[float], kinds: Sequence[int], packs: int) -> list[list[int]]:
    """Longest processing time first, equal counts a pack, no two items of one kind together where that is possible."""
    room = len(weights) // packs
    held: list[list[int]] = [[] for _ in range(packs)]
    load = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        having = [{kinds[i] for i in pack} for pack in held]
        open_packs = [p for p in range(packs) if len(held[p]) < room]
        fitting = [p for p in open_packs if kinds[item] not in having[p]]
        pack = min(fitting or open_packs, key=lambda p: (load[p], p))
        if not fitting:  # every open pack has this kind: trade places with an item of a full pack that lacks it
            for full in (p for p in range(packs) if kinds[item] not in having[p]):
                tradable = [i for i in held[full] if kinds[i] not in having[pack]]
                if not tradable:  # all its kinds are in the open pack, too: one of them is there twice in the end
                    continue
                moved = min(tradable, key=lambda i: weights[i])
                held[full][held[full].index(moved)] = item
                load[full] += weights[item] - weights[moved]
                item = moved
                break
        held[pack].append(item)
        load[pack] += weights[item]
    return held


def lower_bound(loads_E: Sequence[float], num_slots: int, num_gpus: int) -> float:
    """A load no placement gets below on its busiest GPU: the mean, or the hottest expert over its most replicas.

    An expert's replicas share its load evenly and at most one stands on each GPU, of the slots the others leave.
    """
    most_replicas = min(num_gpus, num_slots - len(loads_E) + 1)
    return max(sum(loads_E) / num_gpus, max(loads_E) / most_replicas)


def balancedness(load_W: Sequence[float]) -> float:
    """Mean over maximum of the ranks' loads: 1.0 is perfect, 1 / W is one rank doing everything, 1.0 for no load."""
    busiest = max(load_W)
    return sum(load_W) / len(load_W) / busiest if busiest > 0 else 1.0


@dataclass(frozen=True)
class BalanceReport:
    """Per layer: the load of every rank, and the bound no placement of that many slots can go below."""

    load_NW: list[list[float]]
    bound_N: list[float]
    num_slots: int

    def __str__(self) -> str:
        return "\n".join(
            f"layer {layer}: busiest of {len(load)} ranks {max(load):.1f}, mean {sum(load) / len(load):.1f}, "
            f"balancedness {balancedness(load):.3f}; no placement of {self.num_slots} slots can be below {bound:.1f}"
            for layer, (load, bound) in enumerate(zip(self.load_NW, self.bound_N, strict=True))
        )


def balance_report(weight_NE: Tensor, physical_to_logical_NP: Tensor, num_gpus: int) -> BalanceReport:
    """What a placement (-1: an empty slot) makes of a load [N, E]: replicas share their expert's load evenly."""
    load_NW, bound_N = [], []
    slots = physical_to_logical_NP.shape[1]
    for loads, placed in zip(weight_NE.double().tolist(), physical_to_logical_NP.tolist(), strict=True):
        share = [loads[expert] / placed.count(expert) if expert >= 0 else 0.0 for expert in placed]
        per_gpu = slots // num_gpus
        load_NW.append([sum(share[r * per_gpu : (r + 1) * per_gpu]) for r in range(num_gpus)])
        bound_N.append(lower_bound(loads, slots, num_gpus))
    return BalanceReport(load_NW, bound_N, slots)
