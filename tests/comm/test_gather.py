"""Gathers of real ranks over gloo tell apart ranks that differ, and no process ends; rows are seen as they arrive."""

import doctest
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from crossdock import make_transport
from crossdock.comm import Dispatcher, TorchTransport, Transport, agreement
from crossdock.comm.torch_dist import FIRST_ROOM, MOST_ROOM
from crossdock.moe.trace import Recorder, Watched
from crossdock.parallel import EPGroup
from tests.comm.one_after_another import errors_of
from tests.launch import Ranks

LENGTHS = (3, 0, FIRST_ROOM, FIRST_ROOM + 1, 2, 100, 100, MOST_ROOM + 1, 100, MOST_ROOM + 1)
MESSAGES = (1, 1, 1, 2, 1, 2, 1, 2, 1, 2)  # how many each takes


def test_the_examples_are_right() -> None:
    result = doctest.testmod(agreement)
    assert result.attempted and not result.failed


def lengths(group: EPGroup) -> list[int]:
    """Gathers of all LENGTHS, whatever their text; how many messages each took."""
    transport, counts = make_transport(group), []
    assert isinstance(transport, TorchTransport)
    real, rooms = transport._gather, []

    def counted(values: list[int], room: int, phase: str) -> Any:
        rooms.append(room)
        return real(values, room, phase)

    transport._gather = counted  # type: ignore[method-assign]
    for length in LENGTHS:
        rooms.clear()
        found = transport.all_gather([(group.rank + 1) << 60] * length, "gather")
        assert found == [[(rank + 1) << 60] * length for rank in range(group.world_size)]
        counts.append(len(rooms))
    return counts


def test_any_length_in_one_message_once_as_many_have_been_gathered(ranks_of_two: Ranks) -> None:
    assert ranks_of_two.run(lengths) == [list(MESSAGES)] * 2


def unequal(group: EPGroup, odd: int, lengths: tuple[int, int], phase: str) -> None:
    """Rank `odd` gathers another number of integers."""
    transport, is_odd = make_transport(group), group.rank == odd
    transport.all_gather([1] * 5, f"any text, {group.rank}" if odd == 0 else "start")
    transport.all_gather([1] * lengths[is_odd], phase if is_odd else PLAN)


def swapped(group: EPGroup, odd: int) -> None:
    """Two layers plan; rank `odd` dispatches in the other order: rows of equal size, which gloo hands over."""
    transport = make_transport(group)
    layers = [Dispatcher(transport, 6, 8, torch.float32) for _ in range(2)]
    ids_TK = torch.arange(6)[:, None]
    plans = [layer.plan(ids_TK) for layer in layers]
    order = (1, 0) if group.rank == odd else (0, 1)
    arriving = [layers[n].dispatch_async(torch.full((6, 8), float(n)), plans[n]) for n in order]
    for pending in arriving:
        pending.wait()
    layers[0].plan(ids_TK)


PLAN = "plan of exchange 2"
UNEQUAL = [
    (2, (3, 5), "combine", "rank 2 is elsewhere: combine"),
    (1, (3, 200), PLAN, "rank 1 gathers 200 integers, expected 3"),
    (0, (9000, 4), "count", "rank 0 is elsewhere: count"),
]


@pytest.fixture(scope="module")
def said() -> list[list[str]]:
    """What each of three ranks raised, by rank: in all that is UNEQUAL, then with rows swapped on rank 0, and on 2."""
    works = [partial(unequal, odd=odd, lengths=lengths, phase=phase) for odd, lengths, phase, _ in UNEQUAL]
    with Ranks(3) as ranks:
        found: list[list[str]] = ranks.run(errors_of, [*works, partial(swapped, odd=0), partial(swapped, odd=2)])
    return found


@pytest.mark.parametrize("number", range(len(UNEQUAL)))
def test_ranks_that_gather_other_lengths_are_named_by_all(number: int, said: list[list[str]]) -> None:
    odd, _, phase, text = UNEQUAL[number]
    other = 1 if odd == 0 else 0
    expected = {rank: text if rank == other else f"{text} (found by rank {other})" for rank in range(3)}
    expected[odd] = f"the others gave up on this rank (found by rank {other}): {text}"
    for rank, errors in enumerate(said):
        where = phase if rank == odd else PLAN
        assert errors[number] == f"PlanMismatch: rank {rank}: {where}: {expected[rank]}"


@pytest.mark.parametrize(("number", "odd"), [(3, 0), (4, 2)])
def test_rows_that_moved_in_another_order_are_named_at_the_next_plan(
    number: int, odd: int, said: list[list[str]]
) -> None:
    text = f"rank {odd} has come here by other exchanges or transports, or in another order, than rank {int(odd == 0)}"
    for rank, errors in enumerate(said):
        assert errors[number].startswith(f"PlanMismatch: rank {rank}: {PLAN} in MoE layer 0: "), errors[number]
        assert text in errors[number]


def arrivals(group: EPGroup) -> tuple[float, float, float]:
    """Seconds from start to arrival, as the transport and as a recorder saw it, of rows waited for after a second."""
    recorder, seen = Recorder(), []
    plain: Transport = make_transport(group)
    watched, each = Watched(plain, recorder), [1000] * group.world_size
    rows = torch.full((1000 * group.world_size, 64), float(group.rank))
    for carrier in (plain, watched):  # connections are made at the first
        carrier.all_to_all_rows(rows, each, each, "warm up").wait()
    recorder.clear()
    plain.all_gather([0], "start")
    began = time.perf_counter()
    pendings: list[Any] = [carrier.all_to_all_rows(rows, each, each, "rows") for carrier in (plain, watched)]
    see: Callable[[], None] = lambda: seen.append(time.perf_counter() - began)  # noqa: E731
    pendings[0].on_arrival(see)
    time.sleep(1.0)
    for pending in pendings:
        assert torch.equal(pending.wait()[::1000, 0], torch.arange(float(group.world_size)))
    (flight,) = recorder.flights
    return seen[0], (flight.end - flight.begin) / 1e9, float(flight.seen_arriving)


def test_rows_are_seen_arriving_before_they_are_waited_for(ranks_of_two: Ranks) -> None:
    for plain_s, recorded_s, seen_arriving in ranks_of_two.run(arrivals):
        assert 0 < plain_s < 0.8 and 0 < recorded_s < 0.8 and seen_arriving


def other_transport(group: EPGroup, kinds: Sequence[str]) -> list[list[int]]:
    """Two transports each, over the same connections; rank 1 uses the other one first."""
    transports = [make_transport(group, kinds[(group.rank + number) % 2]) for number in range(2)]
    return transports[group.rank if kinds[0] == kinds[1] else 0].all_gather([1], "count")


@pytest.mark.parametrize("kinds", [("torch", "torch"), ("torch", "symmetric")])
def test_ranks_that_use_another_transport_are_told_apart(kinds: tuple[str, str]) -> None:
    with Ranks(2) as ranks:
        for rank, text in enumerate(ranks.run(errors_of, [partial(other_transport, kinds=kinds)])):
            assert text[0].startswith(f"PlanMismatch: rank {rank}: count: ") and "exchanges or transports" in text[0]
