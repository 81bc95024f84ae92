"""The exchange's conformance cases and the oracles they are held to: plain loops over all tokens, no shared code.

A transport joins by a name in `test_conformance.RUNNERS`. FORMS are the ways in which a case can travel; those over
nodes have an oracle of their own for sums, whose order the nodes decide.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.comm import Dispatcher, HierarchicalDispatcher, Inbound, Transport
from crossdock.comm.legs import Arriving, Returning

FORMS = ("flat", "node", "node in 2 portions", "node in 5 portions", "node, weights later")


@dataclass(frozen=True)
class Case:
    """T of each rank; ids drawn as `kind` says."""

    name: str
    tokens: tuple[int, ...]
    hidden: int = 33
    top_k: int = 4
    slots_per_rank: int = 3
    kind: str = "random"
    dtype: torch.dtype = torch.float32

    @property
    def world_size(self) -> int:
        return len(self.tokens)


def cases(world_size: int) -> list[Case]:
    """What every transport must carry without a changed bit."""
    even = (5,) * world_size
    return [
        Case("even", even),
        Case("uneven", tuple(3 * r + 1 for r in range(world_size))),
        Case("no tokens on rank 0", (0,) + (4,) * (world_size - 1)),
        Case("no tokens anywhere", (0,) * world_size),
        Case("tokens on the last rank only", (0,) * (world_size - 1) + (7,)),
        Case("all rows to one expert", even, kind="one slot"),
        Case("empty experts", even, kind="few slots"),
        Case("one choice", even, top_k=1),
        Case("eight choices of odd width, bfloat16", even, top_k=8, hidden=7, dtype=torch.bfloat16),
        Case("width one, float16", even, hidden=1, dtype=torch.float16),
        Case("float64", even, dtype=torch.float64),
        Case("rows without experts", even, kind="holes"),
        Case("no expert at all", even, kind="none"),
        Case("replicas: a slot twice for one token", even, kind="repeats"),
        Case("one slot a rank", even, slots_per_rank=1),
        Case("rows so many that a token travels to a rank once", (30,) * world_size, hidden=2500, top_k=8),
    ]


def inputs(case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x_TD, slot_ids_TK, weights_TK) of every rank."""
    generator = torch.Generator().manual_seed(case.world_size)
    slots = case.world_size * case.slots_per_rank
    dice = random.Random(case.name)
    ranks = []
    for count in case.tokens:
        x_TD = torch.randn(count, case.hidden, generator=generator).to(case.dtype)
        weights_TK = torch.rand(count, case.top_k, generator=generator)
        ids = [[_draw(case.kind, dice, slots) for _ in range(case.top_k)] for _ in range(count)]
        ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(count, case.top_k)
        if case.kind in ("holes", "none"):  # what stands beside "no expert" must not spread
            weights_TK[ids_TK < 0] = float("nan")
        ranks.append((x_TD, ids_TK, weights_TK))
    return ranks


def _draw(kind: str, dice: random.Random, slots: int) -> int:
    match kind:
        case "one slot":
            return slots - 1
        case "few slots":
            return dice.choice([0, slots // 2])
        case "holes":
            return dice.randrange(-1, slots) if dice.random() < 0.6 else -1
        case "none":
            return -1
        case "repeats":
            return dice.randrange(min(2, slots))
    return dice.randrange(slots)


def expert(rows: Tensor, slot: int) -> Tensor:
    """A stand-in for an expert that no two slots share and that changes no rounding."""
    return rows * 2.0 ** (slot % 5 - 2)


def exchange(transport: Transport, case: Case, form: str = "flat") -> dict[str, Tensor]:
    """What is under test: one layer's dispatch, experts and combine, forward and backward, on this rank."""
    x_TD, ids_TK, weights_TK = (t.clone() for t in inputs(case)[transport.rank])
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    slots = case.world_size * case.slots_per_rank
    compute = experts_of(transport.rank, case.slots_per_rank)
    if form == "flat":
        flat = Dispatcher(transport, slots, case.hidden, case.dtype)
        inbound = flat.dispatch(x_TD, flat.plan(ids_TK))
        y_TD = flat.combine(compute(inbound), weights_TK, inbound)
    else:
        nodes = HierarchicalDispatcher(transport, slots, case.hidden, case.dtype)
        plan = nodes.plan(ids_TK, None if form == "node, weights later" else weights_TK)
        arriving = nodes.dispatch_async(x_TD, plan)
        if "portions" in form:
            y_TD = in_portions(nodes, arriving, weights_TK, compute, int(form.split()[2]))
            inbound = nodes.dispatch(x_TD, plan)
        else:
            inbound = arriving.wait()
            y_TD = nodes.combine(compute(inbound), weights_TK, inbound)
    (y_TD.double() * _target(y_TD)).sum().backward()
    assert x_TD.grad is not None and weights_TK.grad is not None
    return {"rows_RD": inbound.rows_RD.detach(), "ends_L": inbound.ends_L, "y_TD": y_TD.detach(),
            "dx_TD": x_TD.grad, "dweights_TK": weights_TK.grad}  # fmt: skip


def in_portions(
    nodes: HierarchicalDispatcher,
    arriving: Arriving,
    weights_TK: Tensor,
    compute: Callable[[Inbound], Tensor],
    number: int,
) -> Tensor:
    """As the layer's pipeline does it: far results return while near rows are computed, if any still are."""
    returning: Returning | None = None
    for pending in arriving.portions(number):
        portion = pending.wait()
        out_RD = compute(portion)
        returning = returning or Returning(nodes, arriving.plan, weights_TK, None, number)
        returning.start(out_RD, portion)
    assert returning is not None
    return returning.wait()


def experts_of(rank: int, slots_per_rank: int) -> Callable[[Inbound], Tensor]:
    """A rank's experts: rows by slot -> results in the same order."""

    def compute(inbound: Inbound) -> Tensor:
        pieces, start = [], 0
        for local, end in enumerate(inbound.ends_L.tolist()):
            pieces.append(expert(inbound.rows_RD[start:end], rank * slots_per_rank + local))
            start = end
        return torch.cat(pieces)

    return compute


def _target(y_TD: Tensor) -> Tensor:
    """Small integers, so that products with them are exact."""
    return (torch.arange(y_TD.numel()) % 3 + 1).double().view(y_TD.shape)


def oracle(case: Case) -> list[dict[str, Tensor]]:
    """The same for all ranks, by loops over every (slot, source rank, token, k) and every (token, k)."""
    everyone = inputs(case)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    results: list[dict[str, Tensor]] = []
    for rank in range(case.world_size):
        rows, ends = [], []
        for slot in range(rank * case.slots_per_rank, (rank + 1) * case.slots_per_rank):
            for x_TD, ids_TK, _ in everyone:
                for t in range(len(x_TD)):
                    rows += [x_TD[t] for k in range(case.top_k) if ids_TK[t, k] == slot]
            ends.append(len(rows))
        x_TD, ids_TK, weights_TK = everyone[rank]
        y_TD, dx_TD, dweights_TK = torch.zeros_like(x_TD), torch.zeros_like(x_TD), torch.zeros_like(weights_TK)
        target_TD = _target(x_TD).to(case.dtype).to(wide)
        for t in range(len(x_TD)):
            y_D, dx_D = torch.zeros(case.hidden, dtype=wide), torch.zeros(case.hidden, dtype=wide)
            for k in range(case.top_k):
                slot = int(ids_TK[t, k])
                if slot < 0:
                    continue
                weight = weights_TK[t, k].to(wide)
                out_D = expert(x_TD[t], slot).to(wide)
                y_D = y_D + weight * out_D
                dx_D = dx_D + expert((target_TD[t] * weight).to(case.dtype), slot).to(wide)
                dweights_TK[t, k] = (target_TD[t] * out_D).sum()
            y_TD[t], dx_TD[t] = y_D.to(case.dtype), dx_D.to(case.dtype)
        rows_RD = torch.stack(rows) if rows else x_TD.new_empty(0, case.hidden)
        results.append({"rows_RD": rows_RD, "ends_L": torch.tensor(ends, dtype=torch.int32), "y_TD": y_TD,
                        "dx_TD": dx_TD, "dweights_TK": dweights_TK})  # fmt: skip
    return results


def oracle_over_nodes(case: Case, node_of_rank: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """`oracle` where a token crosses to a node once: another order of rows and of sums; gradients to rounding."""
    everyone, results = inputs(case), oracle(case)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    number = [node_of_rank[:rank].count(node) for rank, node in enumerate(node_of_rank)]
    for rank, result in enumerate(results):

        def enters(source: int, rank: int = rank) -> tuple[bool, int, int]:
            return node_of_rank[source] != node_of_rank[rank], number[source], source

        rows = []
        for slot in range(rank * case.slots_per_rank, (rank + 1) * case.slots_per_rank):
            for source in sorted(range(case.world_size), key=enters):
                x_TD, ids_TK, _ = everyone[source]
                for t in range(len(x_TD)):
                    rows += [x_TD[t] for k in range(case.top_k) if ids_TK[t, k] == slot]
        result["rows_RD"] = torch.stack(rows) if rows else result["rows_RD"]
        x_TD, ids_TK, weights_TK = everyone[rank]
        for t in range(len(x_TD)):
            y_D = torch.zeros(case.hidden, dtype=wide)
            for node in range(max(node_of_rank) + 1):
                part_D = torch.zeros(case.hidden, dtype=wide)
                for k in range(case.top_k):
                    slot = int(ids_TK[t, k])
                    if slot >= 0 and node_of_rank[slot // case.slots_per_rank] == node:
                        part_D = part_D + weights_TK[t, k].to(wide) * expert(x_TD[t], slot).to(wide)
                y_D = y_D + part_D.to(case.dtype).to(wide)
            result["y_TD"][t] = y_D.to(case.dtype)
    return results
