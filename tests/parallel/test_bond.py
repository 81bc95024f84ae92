"""Starts that fail leave nothing behind that the next one would meet; what a failed group holds is not waited for."""

import os
import time
from collections.abc import Callable, Iterator
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock.cli.launch import free_port
from crossdock.comm import make_transport
from crossdock.errors import CommTimeout, RankFailure
from crossdock.parallel import EPGroup, Topology, init, joining
from crossdock.parallel.bond import Bond, connect, start_world
from crossdock.parallel.meeting import Arrival, meet
from crossdock.parallel.standing import Failure
from crossdock.parallel.watch import Channel
from tests.launch import Ranks

CPU = torch.device("cpu")


@pytest.fixture
def no_world() -> Iterator[None]:
    assert not dist.is_initialized()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def start_alone(run: Callable[[str, Callable[[], Any]], Any]) -> dist.ProcessGroup:
    return start_world(SimpleNamespace(name="init", run=run), dist.HashStore(), 0, 1, CPU, 5.0)  # type: ignore[arg-type]


def test_a_start_that_was_given_up_leaves_no_default_group(no_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its own, which a thread makes after all, nor does that thread take the next one's."""
    real, inside, go_on = dist.init_process_group, Event(), Event()
    threads: list[Thread] = []
    raised: list[BaseException] = []

    def slow(*given: Any, **named: Any) -> None:
        inside.set()
        go_on.wait(20.0)
        real(*given, **named)

    def gives_up(_: str, work: Callable[[], Any]) -> Any:
        def nobody_waits() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        threads.append(Thread(target=nobody_waits))
        threads[-1].start()
        assert inside.wait(20.0)
        raise CommTimeout("too late")

    monkeypatch.setattr(dist, "init_process_group", slow)
    for _ in range(2):  # the second one never begins
        with pytest.raises(CommTimeout, match="too late"):
            start_alone(gives_up)
    made: list[Any] = []
    threads.append(Thread(target=lambda: made.append(start_alone(lambda _, work: work()))))
    threads[-1].start()
    go_on.set()
    for thread in threads:
        thread.join(20.0)
    assert [str(error) for error in raised] == ["nobody waits for this start any more"] * 2
    assert len(made) == 1 and dist.group.WORLD is made[0]


def test_a_start_that_fails_after_it_was_made_takes_it_back(no_world: None) -> None:
    def fails_behind(_: str, work: Callable[[], Any]) -> Any:
        work()
        raise RankFailure("rank 1 is gone")

    with pytest.raises(RankFailure, match="rank 1 is gone"):
        start_alone(fails_behind)
    assert not dist.is_initialized()


def start_again(group: EPGroup, port: int) -> list[list[int]]:
    group.close()
    dist.distributed_c10d._world.group_count = group.rank  # as a start leaves it that failed on rank 1 alone
    os.environ["MASTER_PORT"] = str(port)
    with init("cpu", 20.0) as again:
        return make_transport(again).all_gather([again.rank], "again")


def test_ranks_meet_again_after_a_start_that_failed_on_some() -> None:
    with Ranks(2) as ranks:
        assert ranks.run(start_again, free_port()) == [[[0], [1]]] * 2


def test_who_leaves_a_start_by_an_interrupt_is_named() -> None:
    store, found = dist.HashStore(), dict[int, BaseException]()

    def come(rank: int) -> None:
        deadline = time.monotonic() + 20.0

        def arrive(mine: Arrival) -> Any:
            return meet(store, mine, deadline, 20.0)

        def start(_: Any, channel: Channel) -> Any:
            def work() -> None:
                time.sleep(20.0 if rank == 0 else 0.0)

            channel.run("init", work)
            raise KeyboardInterrupt

        try:
            joining._become(rank, 2, CPU, "127.0.0.1", None, None, deadline, arrive, start)
        except BaseException as error:
            found[rank] = error

    threads = [Thread(target=come, args=(rank,)) for rank in range(2)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert str(found[0]) == "rank 0: init: rank 1 gave up: KeyboardInterrupt:" and isinstance(found[0], RankFailure)
    assert isinstance(found[1], KeyboardInterrupt) and time.monotonic() - began < 15


class Pending:
    """A process group with an operation under way, which ends by its timeout or an abort."""

    def __init__(self) -> None:
        self.aborted = Event()

    def abort(self) -> None:
        self.aborted.set()

    def __del__(self) -> None:
        self.aborted.wait(10.0)


def test_a_failed_group_is_closed_without_a_wait_for_what_is_pending() -> None:
    watch = SimpleNamespace(failure=Failure("gone", (1,), "rank 1 is gone", 0), close=lambda: None)
    bond: Any = SimpleNamespace(watch=watch, let_go=lambda: [Pending()])
    group = EPGroup(0, 2, CPU, None, Topology((0, 0)), 5.0, bond=bond)
    began = time.monotonic()
    group.close()
    assert time.monotonic() - began < 5


def test_a_group_that_was_let_go_of_has_no_new_parts() -> None:
    watch: Any = SimpleNamespace(failure=None)
    bond = Bond(watch, dist.HashStore(), connect(dist.HashStore(), "whole", 0, 1, CPU, 5.0), CPU)
    assert bond.part("part", 0, 1, 5.0).process_group is not None
    bond.let_go().clear()
    with pytest.raises(RuntimeError, match="the group of this transport is closed"):
        bond.part("another", 0, 1, 5.0)
