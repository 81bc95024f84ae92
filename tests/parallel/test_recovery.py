"""Going on: who leaves whom out, what is let go of, and what an engine keeps."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from crossdock.comm import make_transport
from crossdock.errors import ConfigError, RankFailure
from crossdock.parallel import EPGroup, Topology, recover
from crossdock.parallel.recovery import _Recovery
from crossdock.parallel.standing import Failure, Lost
from crossdock.parallel.watch import Watch
from crossdock.parallel.wires import ENDED
from tests.launch import RankError, Ranks
from tests.parallel.test_wires import until, wired


def recovery(rank: int, world_size: int, blamed: tuple[int, ...], views: dict[int, list[int]]) -> _Recovery:
    """That of `rank`, to which the others have told `views`."""
    watch = SimpleNamespace(
        rank=rank,
        members=tuple(range(world_size)),
        wires=SimpleNamespace(lost={}, changed=None),
        failure=Failure("silent", blamed, "", 0),
        notes={"view": {sender: {"ranks": ranks} for sender, ranks in views.items()}},
    )
    return _Recovery(watch, torch.device("cpu"), 9.0, 9.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rank", "world_size", "views"),
    [
        (0, 4, {1: [1, 2, 3], 2: [1, 2, 3], 3: [1, 2, 3]}),  # stopped for a while
        (0, 3, {1: [1, 2], 2: [1, 2]}),
        (0, 3, {1: [1, 2]}),  # the other's word is on its way
        (0, 2, {1: [1]}),
        (2, 4, {0: [0, 1], 1: [0, 1]}),  # as large: the lowest rank's side
    ],
)
def test_a_rank_left_behind_says_so(rank: int, world_size: int, views: dict[int, list[int]]) -> None:
    one = recovery(rank, world_size, (rank,) if rank == 0 else (), views)
    with pytest.raises(RankFailure, match=f"rank {rank}: recovery: the others went on without this rank"):
        one._shrink()


@pytest.mark.parametrize(
    ("rank", "world_size", "views", "left"),
    [
        (0, 4, {3: [3]}, {0, 1, 2}),  # rank 3 saw nobody for a while
        (2, 4, {3: [3], 0: [0, 1, 2, 3]}, {0, 1, 2}),
        (0, 4, {2: [2, 3], 3: [2, 3]}, {0, 1}),
        (0, 2, {1: [1]}, {0}),
        (1, 3, {0: [0, 1]}, {0, 1}),
    ],
)
def test_a_smaller_side_ends_no_other(rank: int, world_size: int, views: dict[int, list[int]], left: set[int]) -> None:
    one = recovery(rank, world_size, (), views)
    one._shrink()
    assert one.view == left


def test_who_is_out_already_is_not_heard() -> None:
    """A network that fell apart and heals: each side has gone on."""
    one = recovery(2, 4, (), {0: [0, 1], 1: [0, 1], 3: [2, 3]})
    one.view = {2, 3}
    one._shrink()
    assert one.view == {2, 3}


@pytest.mark.parametrize(
    ("made", "is_over"),
    [
        ({0: [0, 2], 2: [0, 2]}, True),
        ({2: [2]}, True),  # alone, but rank 1 is to blame
        ({2: [1, 2]}, False),
    ],
)
def test_who_comes_when_the_others_have_gone_on_is_told(made: dict[int, list[int]], is_over: bool) -> None:
    """They have cut it off by then."""
    late = recovery(1, 3, (1,), {0: [0, 2], 2: [0, 2]})
    late.watch.notes["made"] = {sender: {"ranks": ranks} for sender, ranks in made.items()}
    late.watch.wires.lost = {0: Lost(ENDED), 2: Lost(ENDED)}
    if is_over:
        with pytest.raises(RankFailure, match="rank 1: recovery: the others went on without this rank"):
            late._shrink()
    else:
        late._shrink()
        assert late.view == {1}


def test_one_that_saw_nobody_for_a_while_and_went_on_ends_no_other() -> None:
    one = recovery(1, 3, (), {})
    one.watch.notes["made"] = {2: {"ranks": [2]}}
    one.watch.wires.lost = {2: Lost(ENDED)}
    one._shrink()
    assert one.view == {0, 1}


def late_to_recover(group: EPGroup) -> tuple[int, ...]:
    assert group.bond is not None
    wires = group.bond.watch.wires
    if group.rank == 1:
        with wires.changed:
            assert wires.changed.wait_for(lambda: {0, 2} <= wires.lost.keys(), 30.0)
    return recover(group, 3.0).members


def test_who_is_late_for_a_recovery_does_not_go_on_alone() -> None:
    with Ranks(3) as ranks, pytest.raises(RankError, match="the others went on without this rank") as caught:
        ranks.run(late_to_recover)
    assert caught.value.kinds == {1: "RankFailure"}


@contextmanager
def two_groups() -> Iterator[list[EPGroup]]:
    """Both ranks of a world, in this process, without a process group."""
    with wired(2) as all_wires:
        watches = [Watch(wires, (0, 1)) for wires in all_wires]
        yield [EPGroup(rank, 2, torch.device("cpu"), None, Topology((0, 0)), 5.0, SimpleNamespace(watch=watch))
               for rank, watch in enumerate(watches)]  # fmt: skip


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan, math.inf])
def test_a_timeout_that_bounds_nothing_is_refused(timeout_s: float) -> None:
    with two_groups() as (zero, _):
        with pytest.raises(ConfigError, match="timeout_s must be above 0 seconds and at most 1e\\+09, found"):
            recover(zero, timeout_s)
        assert zero.communicator.watch.failure is None, "nobody was told of it"


def test_a_recovery_that_fails_leaves_no_connection_open() -> None:
    with two_groups() as (zero, one):
        watch, other = zero.communicator.watch, one.communicator.watch
        other.fail(Failure("silent", (0,), "no sign of rank 0", 1))
        other.tell("view", ranks=[1])
        assert until(watch.wires, lambda: "view" in watch.notes)
        with pytest.raises(RankFailure, match="the others went on without this rank"):
            recover(zero)
        assert until(other.wires, lambda: 0 in other.wires.lost)
        assert other.wires.lost[0].why == "left the group" and not watch.wires._thread.is_alive()


def recovered(group: EPGroup) -> tuple[object, ...]:
    """An adopted group goes on, without a failure; the engine's groups are as they were."""
    theirs = dist.new_group([0, 1])
    mine = EPGroup.from_process_group(theirs, "cpu", 30.0)
    began = time.monotonic()
    with recover(mine) as after:
        found = make_transport(after).all_gather([group.rank], "after")
        assert mine.process_group is None
        with pytest.raises(ConfigError, match="nothing to go on with"):
            recover(mine)
        time.sleep(0.2)  # what lets go of `mine` may run in a thread
        assert dist.is_initialized()
        told = torch.ones(1)
        dist.all_reduce(told, group=theirs)
    with pytest.raises(ConfigError, match="one that is closed, has nothing to go on with"):
        recover(after)
    dist.all_reduce(told)
    assert time.monotonic() - began < 20
    return after.members, found, told.item(), make_transport(group).all_gather([1], "engine")


def test_recovery_leaves_an_engines_groups_alone(ranks_of_two: Ranks) -> None:
    for found in ranks_of_two.run(recovered):
        assert found == ((0, 1), [[0], [1]], 4.0, [[1], [1]])
