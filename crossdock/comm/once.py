"""A token with several experts on one rank travels there once: whether that is worth it, and the integers it takes.

Of 64 experts on 4 ranks, 8 of them a token's, 3.6 rows of 8 are left. What it costs is one small exchange more, of an
int32 for each (token, k), so a few rows are better sent as they are.

Legend: W ranks, P slots, S rows sent, R rows received.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from crossdock.comm.lane import Lane
from crossdock.comm.plan import DispatchPlan, Wanted, once_each

WORTH_BYTES = 1 << 18  # saved a rank: what a fast link moves in the time that one small exchange takes


def is_worth_it(saved: int, world_size: int, row_bytes: int) -> bool:
    """Whether all ranks together send so many rows less, not counting those that stay on their rank."""
    return saved * row_bytes > world_size * WORTH_BYTES


@dataclass(frozen=True)
class Planned:
    """A plan in which each (token, k) travels by itself, and what it takes to do better, where that is worth it:
    which tokens each rank wants, and how many each rank has for this one."""

    plan: DispatchPlan
    wanted: Wanted | None = None
    recv_counts: tuple[int, ...] = ()


def with_once(planned: Sequence[Planned], lane: Lane) -> list[DispatchPlan]:
    """Plans in which a token goes to a rank once where that is worth it. A collective, in which each rank tells which
    row stands where, for all plans together."""
    better = [(each.plan, each.wanted) for each in planned if each.wanted is not None]
    if not better:
        return [each.plan for each in planned]
    plans = [plan for plan, _ in better]
    index = [torch.from_numpy(wanted.index_S)[:, None].to(plan.ends_L.device) for plan, wanted in better]
    arrived = iter(lane.together(index, plans, "plan").wait())
    return [
        each.plan
        if each.wanted is None
        else replace(each.plan, once=once_each(each.plan, each.wanted, [*each.recv_counts], next(arrived)))
        for each in planned
    ]
