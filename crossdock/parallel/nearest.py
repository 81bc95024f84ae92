"""Which replica of an expert a rank's tokens take: the nearest, as far as that overloads none of them.

Taking replicas in turn spreads an expert's load evenly and sends half of a rank's rows past the replica it holds
itself. Here each rank divides its tokens over an expert's slots in UNITS equal parts. All start at the nearest slots:
those on the rank itself, else on its node, else all. Then, while a slot has more than (1 + slack) times an even share,
parts move from it to slots with room, those first that get the least farther away. Where parts are too coarse for that
the expert is spread evenly, which always fits. An expert's load is one rank's business no more than another's, so every
rank computes the parts of all, alike, and takes its own.

Four ranks on two nodes; expert 0 stands on ranks 0 and 2, experts 1 and 2 on ranks 1 and 3. Rank 1 takes expert 0 from
its own node:

>>> placement = ExpertPlacement(3, 4, (0, 1, 0, 2))
>>> topology = Topology((0, 0, 1, 1))
>>> slots_EX, count_E = nearest_replicas(placement, topology, 1, [[8, 1, 1]] * 4)
>>> slots_EX.tolist(), count_E.tolist()
([[0], [1], [3]], [1, 1, 1])

Where rank 1 alone asks for expert 0, and has 10 tokens for it, slot 0 may have 11 / 2 of them:

>>> slots_EX, count_E = nearest_replicas(placement, topology, 1, [[0, 1, 1], [10, 1, 1], [0, 1, 1], [0, 1, 1]])
>>> slots_EX[0].tolist().count(0), slots_EX[0].tolist().count(2)
(13, 11)

Legend: E logical experts, W ranks, X entries of an expert, the most of any.
"""

from collections.abc import Sequence
from itertools import product
from math import gcd

import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.parallel.placement import ExpertPlacement
from crossdock.parallel.topology import Topology

UNITS = 24  # parts of a rank's tokens for one expert, at least: many numbers of replicas divide it
ROUNDING = 1e-9  # of an even share

Parts = list[list[int]]  # [W][replicas]: how many of its parts a rank takes from each of an expert's slots


def nearest_replicas(
    placement: ExpertPlacement,
    topology: Topology,
    rank: int,
    load: Tensor | Sequence[float] | Sequence[Sequence[float]],
    slack: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Tables (slots_EX, count_E), int64 on the CPU, for the tokens of `rank`: token t takes slots[e, t % count[e]].

    They stand where a placement's logical_to_physical_EX and replica_count_E do, -1 padded; a slot may stand there
    several times. load: [W, E], how much of each expert's each rank's tokens choose, or [E], and ranks are alike; any
    unit. Pure and deterministic: ranks that give the same arguments but `rank` agree. No slot gets more than
    (1 + slack) times its expert's load over its replicas. Raises ConfigError for sizes that differ, a load that is
    negative or not finite, and a slack below 0.
    """
    load_WE = _load_by_rank(load, placement, topology)
    if not 0 <= slack < float("inf"):
        raise ConfigError(f"slack must be a number of at least 0, found {slack}")
    if not 0 <= rank < placement.world_size:
        raise ConfigError(f"rank must be in 0..{placement.world_size - 1}, found {rank}")
    entries = []
    slots_EX, count_E = placement.logical_to_physical_EX.tolist(), placement.replica_count_E.tolist()
    for expert, (slots, count) in enumerate(zip(slots_EX, count_E, strict=True)):
        held = slots[:count]
        distance = [[_distance(placement, topology, w, slot) for slot in held] for w in range(placement.world_size)]
        parts = divide([loads[expert] for loads in load_WE], distance, slack)[rank]
        entries.append([held[n] for n in _in_turn(parts)])
    most = max(map(len, entries))
    return torch.tensor([e + [-1] * (most - len(e)) for e in entries]), torch.tensor([len(e) for e in entries])


def _load_by_rank(
    load: Tensor | Sequence[float] | Sequence[Sequence[float]], placement: ExpertPlacement, topology: Topology
) -> list[list[float]]:
    ranks, experts = placement.world_size, placement.num_experts
    if len(topology.node_of_rank) != ranks:
        raise ConfigError(f"placement is for {ranks} ranks, topology places {len(topology.node_of_rank)}")
    load = torch.as_tensor(load).double()
    if load.shape not in ((experts,), (ranks, experts)):
        raise ConfigError(f"load must be [{experts}] or [{ranks}, {experts}], found {list(load.shape)}")
    if not bool(torch.isfinite(load).all()) or bool((load < 0).any()):
        raise ConfigError("load must be finite and at least 0")
    by_rank: list[list[float]] = load.expand(ranks, experts).tolist()
    return by_rank


def _distance(placement: ExpertPlacement, topology: Topology, rank: int, slot: int) -> int:
    """0 on the rank itself, 1 on its node, 2 beyond."""
    there = slot // placement.slots_per_rank
    return 0 if there == rank else 1 if topology.same_node(there, rank) else 2


def divide(load_W: Sequence[float], distance: Sequence[Sequence[int]], slack: float) -> Parts:
    """One expert's parts, from each rank's load and the distance of each of its slots from each rank."""
    slots = len(distance[0])
    units = UNITS + -UNITS % slots
    even: Parts = [[units // slots] * slots for _ in load_W]
    parts = [_nearest(rank, row, units) for rank, row in enumerate(distance)]
    unit_W = [load / units for load in load_W]
    cap = (1 + slack) * sum(load_W) / slots * (1 + ROUNDING)
    loads = [sum(unit * row[slot] for unit, row in zip(unit_W, parts, strict=True)) for slot in range(slots)]
    for farther, full, room in product((0, 1, 2), range(slots), range(slots)):
        for rank in reversed(range(len(load_W))):
            is_next = distance[rank][room] - distance[rank][full] == farther
            if not is_next or full == room or loads[full] <= cap or unit_W[rank] == 0:
                continue
            too_many = -int((cap - loads[full]) // unit_W[rank])
            fitting = int((cap - loads[room]) // unit_W[rank])
            moved = max(0, min(parts[rank][full], too_many, fitting))
            parts[rank][full], parts[rank][room] = parts[rank][full] - moved, parts[rank][room] + moved
            loads[full], loads[room] = loads[full] - moved * unit_W[rank], loads[room] + moved * unit_W[rank]
    return parts if max(loads) <= cap else even


def _nearest(rank: int, distances: Sequence[int], units: int) -> list[int]:
    """All parts on the slots nearest to the rank, evenly; what is left over begins at another slot for each rank."""
    near = [slot for slot, distance in enumerate(distances) if distance == min(distances)]
    each, left = divmod(units, len(near))
    extra = {near[(rank + n) % len(near)] for n in range(left)}
    return [(each + (slot in extra)) if slot in near else 0 for slot in range(len(distances))]


def _in_turn(parts: Sequence[int]) -> list[int]:
    """Slot numbers, each as often as its parts say over their common divisor, spread over the list.

    >>> _in_turn([4, 2, 0])
    [0, 1, 0]
    """
    common = gcd(*parts)
    wanted = [count // common for count in parts]
    spread = [((place + 0.5) / count, slot) for slot, count in enumerate(wanted) for place in range(count)]
    return [slot for _, slot in sorted(spread)]
