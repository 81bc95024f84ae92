"""The exchange's conformance cases and the oracle they are held to: plain loops over all ranks' tokens, no shared code.

A transport joins by a name in `test_conformance.RUNNERS`.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.comm import Dispatcher, Transport


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


def exchange(transport: Transport, case: Case) -> dict[str, Tensor]:
    """What is under test: one layer's dispatch, experts and combine, forward and backward, on this rank."""
    x_TD, ids_TK, weights_TK = (t.clone() for t in inputs(case)[transport.rank])
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    dispatcher = Dispatcher(transport, case.world_size * case.slots_per_rank, case.hidden, case.dtype)
    plan = dispatcher.plan(ids_TK)
    inbound = dispatcher.dispatch(x_TD, plan)
    pieces, start = [], 0
    for local, end in enumerate(inbound.ends_L.tolist()):
        pieces.append(expert(inbound.rows_RD[start:end], transport.rank * case.slots_per_rank + local))
        start = end
    y_TD = dispatcher.combine(torch.cat(pieces), weights_TK, inbound)
    (y_TD.double() * _target(y_TD)).sum().backward()
    assert x_TD.grad is not None and weights_TK.grad is not None
    return {"rows_RD": inbound.rows_RD.detach(), "ends_L": inbound.ends_L, "y_TD": y_TD.detach(),
            "dx_TD": x_TD.grad, "dweights_TK": weights_TK.grad}  # fmt: skip


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
