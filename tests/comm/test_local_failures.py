"""Virtual ranks fail as real ones do: named, told to all, for good; and the world of one can be aborted, too."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from crossdock import LocalWorld
from crossdock.comm import LocalTransport, Transport
from crossdock.errors import CommTimeout, CrossdockError, PlanMismatch, RankFailure

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Work = Callable[[Transport], object]


def errors(world_size: int, work: Work, timeout_s: float = 30.0) -> list[CrossdockError | None]:
    """What each rank raised; a rank that raises stays there until all are done."""
    done = threading.Barrier(world_size, timeout=60)

    def caught(transport: Transport) -> CrossdockError | None:
        try:
            work(transport)
            return None
        except CrossdockError as error:
            return error
        finally:
            done.wait()

    return LocalWorld(world_size, timeout_s).run(caught)


def test_an_abort_ends_every_wait_and_is_named() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 1:
            time.sleep(0.2)
            transport.abort("enough")
        elif transport.rank == 2:
            transport.all_to_all_rows(torch.ones(3, 1), [1] * 3, [1] * 3, "rows").wait()
        transport.all_gather([1], "plan")

    began = time.monotonic()
    found = errors(3, work)
    assert [str(error) for error in found] == [
        "rank 0: plan: rank 1 gave up: enough",
        "rank 1: plan: rank 1 gave up: enough",
        "rank 2: rows: rank 1 gave up: enough",
    ]
    assert all(isinstance(error, RankFailure) for error in found) and time.monotonic() - began < 10


def test_an_abort_reaches_parts() -> None:
    def work(transport: Transport) -> None:
        part = transport.split([[0, 1], [2, 3]])
        if transport.rank == 3:
            part.abort("enough")
        part.all_gather([1], "in the part")
        transport.all_gather([1], "in the world")

    for error in errors(4, work):
        assert isinstance(error, RankFailure) and "rank 3 gave up: enough" in str(error)


def test_after_its_first_error_a_transport_raises_it_again_at_once() -> None:
    def work(transport: Transport) -> None:
        part = transport.split([[0], [1]])
        if transport.rank == 1:
            time.sleep(3.0)
        first = "" if transport.rank else "; the last it did was split"
        with pytest.raises(CommTimeout, match=f"rank 1 did not arrive within 1 s{first}"):
            transport.all_gather([1], "plan")
        began = time.monotonic()
        for use in (transport.all_gather, part.all_gather):
            with pytest.raises(CommTimeout, match=r"again: .*rank 1 did not arrive within 1 s"):
                use([1], "again")
        with pytest.raises(CommTimeout, match=r"split: .*rank 1 did not arrive"):
            transport.split([[0, 1]])
        assert time.monotonic() - began < 0.9

    assert errors(2, work, timeout_s=1.0) == [None, None]


def test_blame_follows_who_waits_in_a_part() -> None:
    """Rank 0 waits in the world for rank 1, which waits in a part for rank 2; rank 3 has come to the world."""

    def work(transport: Transport) -> None:
        part = transport.split([[0, 3], [1, 2]])
        if transport.rank == 2:
            time.sleep(4.0)
        if transport.rank in (1, 2):
            part.all_gather([1], "in the part")
        transport.all_gather([1], "in the world")

    for rank, error in enumerate(errors(4, work, timeout_s=2.0)):
        assert isinstance(error, CommTimeout) and "rank 2 did not arrive within 2 s" in str(error), rank


def test_ranks_outside_a_part_that_fails_are_not_named() -> None:
    def work(transport: Transport) -> None:
        part = transport.split([[0, 1], [2, 3]])
        if transport.rank == 0:
            part.all_gather([1], "in the part")
        else:
            time.sleep(3.0)

    found = errors(4, work, timeout_s=1.0)
    assert "rank 1 did not arrive" in str(found[0]) and found[1:] == [None] * 3
    assert "rank 2" not in str(found[0]) and "rank 3" not in str(found[0])


def test_a_rank_that_left_after_its_part_is_not_blamed() -> None:
    def work(transport: Transport) -> list[list[int]]:
        if transport.rank == 1:
            time.sleep(0.5)
        return transport.all_gather([transport.rank], "plan")

    assert LocalWorld(3).run(work) == [[[0], [1], [2]]] * 3


def test_other_parts_are_told_apart() -> None:
    def work(transport: Transport) -> None:
        transport.split([[0], [1, 2]] if transport.rank == 1 else [[0, 1], [2]])

    for rank, error in enumerate(errors(3, work)):
        on_me = "the others gave up on this rank (found by rank 0): " if rank == 1 else ""
        what = "rank 1 has other parts: [[0], [1, 2]], expected [[0, 1], [2]]"
        assert isinstance(error, PlanMismatch) and str(error) == f"rank {rank}: split: {on_me}{what}"


def test_gathers_of_other_lengths_are_told_apart() -> None:
    def work(transport: Transport) -> None:
        transport.all_gather([1], f"any text, {transport.rank}")
        odd = transport.rank == 2
        transport.all_gather([1] * (3 if odd else 2), "combine" if odd else "plan")

    found = errors(3, work)
    assert all(isinstance(error, PlanMismatch) for error in found)
    assert [str(error) for error in found[:2]] == [f"rank {r}: plan: rank 2 is elsewhere: combine" for r in (0, 1)]
    assert "rank 2: combine: the others gave up on this rank (found by rank 0): rank 2 is" in str(found[2])
    (error, _) = errors(2, lambda transport: transport.all_gather([1] * (2 + transport.rank), "plan"))
    assert str(error) == "rank 0: plan: rank 1 gathers 3 integers, expected 2"


class Meeting(torch.autograd.Function):
    """A backward pass in which all ranks meet, as an exchange's does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, transport: Transport) -> torch.Tensor:
        ctx.transport = transport
        return x * 2

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        met.append(threading.current_thread().name)
        ctx.transport.all_gather([1], "backward")
        return dx * 2, None


met: list[str] = []


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def test_virtual_ranks_can_meet_in_their_backward_passes(kind: str) -> None:
    """Each in its own thread: torch has one for each device, in which the first would wait for the others for ever."""

    def work(transport: Transport) -> bool:
        x = torch.ones(1, device=kind, requires_grad=True)
        Meeting.apply(x, transport).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None and x.grad.item() == 2
        return torch._C._is_multithreading_enabled()

    met.clear()
    assert LocalWorld(3, timeout_s=20).run(work) == [False] * 3
    assert sorted(met) == ["rank 0", "rank 1", "rank 2"] and torch._C._is_multithreading_enabled()


def test_a_world_of_one_can_be_aborted() -> None:
    transport = LocalTransport()
    part = transport.split([[0]])
    assert transport.all_gather([3], "plan") == part.all_gather([3], "plan") == [[3]]
    transport.abort("enough")
    part.abort("more than that")
    for use in (lambda: transport.all_gather([3], "plan"), lambda: part.all_gather([3], "plan"),
                lambda: transport.all_to_all_rows(torch.ones(1, 1), [1], [1], "plan")):  # fmt: skip
        with pytest.raises(RankFailure, match="rank 0: plan: rank 0 gave up: enough"):
            use()
