"""A token with several experts on one rank travels there once: whether that is worth it, and the integers it takes.

Of 64 experts on 4 ranks, 8 of them a token's, 3.6 rows of 8 are left. What it costs is one small exchange more, of an
int32 for each (token, k), so a few rows are better sent as they are.

Legend: W ranks, P slots, S rows sent, R rows received.
"""

from dataclasses import replace

from crossdock.comm.lane import Lane
from crossdock.comm.plan import DispatchPlan, Wanted, once_each
from crossdock.comm.transport import Pending, Then

WORTH_BYTES = 1 << 18  # saved a rank: what a fast link moves in the time that one small exchange takes


def is_worth_it(saved: int, world_size: int, row_bytes: int) -> bool:
    """Whether all ranks together send so many rows less, not counting those that stay on their rank."""
    return saved * row_bytes > world_size * WORTH_BYTES


def with_once(plan: DispatchPlan, wanted: Wanted, recv_counts: list[int], lane: Lane) -> Pending[DispatchPlan]:
    """The plan in which a token goes to a rank once. A collective: each rank tells which row stands where."""
    arriving = lane.integers(wanted.index_S[:, None], plan, "plan")

    def finish() -> DispatchPlan:
        index_R = arriving.wait().squeeze(1).cpu().numpy()
        return replace(plan, once=once_each(plan, wanted, recv_counts, index_R))

    return Then(finish)
