"""The one-sided kernels against their references: several ranks' memory in one process, one kernel after the other."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.comm.one_sided import (
    HEADER,
    PROGRAMS,
    TAG,
    UNITS,
    Box,
    Parcel,
    as_units,
    push_rows_ref,
    push_rows_triton,
)
from crossdock.comm.one_sided_arrange import arrange_rows_ref, arrange_rows_triton
from crossdock.comm.one_sided_wait import MISSING, STATUS, TOO_MANY, Awaited, wait_signals_ref, wait_signals_triton
from crossdock.comm.symmetric_heap import FIRST, SymmetricHeap

WORDS = TAG | 5, TAG | 9, 7


def heaps(world: int, box: Box, device: torch.device) -> list[SymmetricHeap]:
    """Every rank's view of memory that nothing has been written to but 0xAB; counters are zero."""
    memory = [torch.full((box.end,), 0xAB, dtype=torch.uint8, device=device) for _ in range(world)]
    for own in memory:
        own[box.at : box.messages_at] = 0
    return [SymmetricHeap(rank, memory) for rank in range(world)]


def sorted_ends(dice: random.Random, world: int, rows: int) -> list[int]:
    return [0, *sorted(dice.randrange(rows + 1) for _ in range(world - 1)), rows]


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 33), (torch.bfloat16, 7), (torch.float16, 600), (torch.uint8, 5), (torch.float64, 1)],
)
def test_rows_arrive_as_the_reference_puts_them(
    world: int, dtype: torch.dtype, width: int, device: torch.device
) -> None:
    """Gathered or not, to a place of their own or not, with and without words; every byte of all memory is compared."""
    dice, programs = random.Random(world), PROGRAMS[device.type]
    for gathered in (True, False):
        box = Box(FIRST, world, 3 if gathered else 0, 12 * width * dtype.itemsize, shared=not gathered)
        found, expected = heaps(world, box, device), heaps(world, box, device)
        for rank in range(world):
            rows_NX = torch.randn(9, width).mul(50).to(dtype).to(device)
            ends = torch.tensor(sorted_ends(dice, world, 9), dtype=torch.int32, device=device)
            index = torch.randint(0, 9, (9,), dtype=torch.int32, device=device) if gathered else None
            to_W = None if gathered else torch.tensor([dice.randrange(3) for _ in range(world)], device=device)
            message = torch.arange(4 * world, device=device).unfold(0, 3, 4) if gathered else None
            parcel = Parcel(rows_NX, ends[:-1], ends[1:], WORDS, 9, index, to_W, message)
            push_rows_ref(parcel, box, expected[rank], programs)
            push_rows_triton(parcel, box, found[rank], programs)
        for one, other in zip(found[0].peers, expected[0].peers, strict=True):
            assert torch.equal(one, other)


def test_no_row_leaves_where_some_do_not_fit(device: torch.device) -> None:
    """The first rank would have got as many as are allowed; the second one more."""
    box, ends = Box(FIRST, 2, 0, 64), torch.tensor([0, 2, 5], device=device)
    for allowed, sent in ((3, True), (2, False), (-1, False)):
        (heap, *_) = heaps(2, box, device)
        parcel = Parcel(torch.ones(5, 4, device=device), ends[:-1], ends[1:], WORDS, allowed)
        push_rows_triton(parcel, box, heap, PROGRAMS[device.type])
        for rank, rows in enumerate((2, 3)):
            region = heap.peers[rank][box.rows_at : box.rows_at + 16 * rows]
            assert torch.equal(region.view(torch.float32).cpu(), torch.ones(4 * rows)) == sent
            message = heap.view(rank, box.messages_at, (HEADER,), torch.int64)
            assert message.tolist() == [*WORDS[:2], 3, WORDS[2]]
            assert heap.view(rank, box.at, (2,), torch.int64).tolist() == [PROGRAMS[device.type], 0]


def test_rows_are_moved_in_the_widest_units_they_allow() -> None:
    storage = torch.zeros(64, dtype=torch.uint8)
    for width, first, unit in ((16, 0, 8), (16, 4, 4), (12, 0, 4), (6, 0, 2), (16, 1, 1), (5, 0, 1)):
        rows = as_units(storage[first : first + 2 * width].view(2, width))
        assert rows.dtype.itemsize == unit and rows.dtype in UNITS and rows.numel() * unit == 2 * width


def test_every_rank_visits_the_others_in_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reference: the first target of each rank is another one, and the last is itself."""
    box, order = Box(FIRST, 3, 0, 64), []
    for heap in heaps(3, box, torch.device("cpu")):
        viewed: list[int] = []

        def view(rank: int, *where: Any, real: Any = heap.view, seen: list[int] = viewed) -> Tensor:
            seen.append(rank)
            return real(rank, *where)

        monkeypatch.setattr(heap, "view", view)
        ends = torch.tensor([0, 1, 2, 3])
        push_rows_ref(Parcel(torch.ones(3, 2), ends[:-1], ends[1:], WORDS, 3), box, heap, 1)
        order.append(viewed[::2])
    assert order == [[1, 2, 0], [2, 0, 1], [0, 1, 2]]


Step = Callable[[SymmetricHeap, Box], None]


def arrive(source: int, programs: int, words: tuple[int, int, int, int] = (*WORDS[:2], 3, 7)) -> Step:
    def step(heap: SymmetricHeap, box: Box) -> None:
        message = heap.view(0, box.messages_at + source * 8 * box.message_words, (HEADER,), torch.int64)
        message.copy_(torch.tensor(words))
        heap.view(0, box.at + 8 * source, (1,), torch.int64).add_(programs)

    return step


def test_waits_find_what_the_reference_finds(device: torch.device) -> None:
    """Missing in part and in whole, arrived, of another exchange, too many, retried, and after a failure."""
    box, awaited, programs = Box(FIRST, 3, 1, 64), Awaited(WORDS[:2], 3, 7), 2
    other, many, late = (TAG, WORDS[1], 9, 9), (*WORDS[:2], 4, 7), (*WORDS[:2], 3, 8)
    story: list[tuple[list[Step], int]] = [
        ([arrive(0, 2), arrive(1, 1)], 0),
        ([arrive(1, 1)], 1),
        ([arrive(2, 2, other)], 1),
        ([arrive(0, 2, many), arrive(1, 2, late)], 0),
        ([], 1),
        ([arrive(0, 2), arrive(1, 2), arrive(2, 2)], 0),
    ]
    (heap, *_), seen = heaps(3, box, device), []
    states = [
        (torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(4, STATUS, dtype=torch.int64, device=device))
        for _ in range(2)
    ]
    for steps, retry in story:
        for step in steps:
            step(heap, box)
        wait_signals_ref(awaited, box, heap, programs, *states[0], retry)
        wait_signals_triton(awaited, box, heap, programs, *states[1], retry, polls=3)
        for one, expected in zip(states[1], states[0], strict=True):
            assert torch.equal(one, expected)
        seen.append(states[1][1].tolist())
    expected = [*WORDS[:2]]
    assert seen[0] == [[0] * 5, [MISSING, 1, 0, *expected], [MISSING, 0, 0, *expected], [1, 0, 0, 0, 0]]
    assert seen[1][1] == [0, 0, 0, *expected]
    assert seen[2][2] == [2, TAG, WORDS[1], *expected]
    assert seen[3][:2] == [[TOO_MANY, 4, 7, *expected], [TOO_MANY, 3, 8, *expected]]


def loops(counts_WL: list[list[int]], capacity: int) -> tuple[list[int], list[int]]:
    """ends_L, and the place in the buffer of each row in slot order."""
    ends, rows = [], []
    for slot in range(len(counts_WL[0])):
        for source, counts_L in enumerate(counts_WL):
            before = source * capacity + sum(counts_L[:slot])
            rows += [before + i for i in range(counts_L[slot])]
        ends.append(len(rows))
    return ends, rows


@pytest.mark.parametrize(("world", "slots"), [(1, 1), (2, 3), (4, 5), (3, 1)])
@pytest.mark.usefixtures("poison")
def test_arranges_rows_by_slot(world: int, slots: int, device: torch.device) -> None:
    """Both forms against loops over every slot and source; one source is found to have sent nothing that counts."""
    dice, capacity = random.Random(world), 300
    for spoilt in (None, world - 1):
        counts_WL = [[dice.choice([0, 1, 2, 40]) for _ in range(slots)] for _ in range(world)]
        starts_W = [dice.randrange(9) for _ in range(world)]
        ends = [[starts_W[w] + sum(counts_WL[w][:slot]) for slot in range(slots + 1)] for w in range(world)]
        status = torch.zeros(world + 1, STATUS, dtype=torch.int64)
        if spoilt is not None:
            status[spoilt, 0] = MISSING
            counts_WL[spoilt] = [0] * slots
        expected_ends, expected_rows = loops(counts_WL, capacity)
        padded = torch.full((world, slots + 4), -7, dtype=torch.int64)
        padded[:, 3:] = torch.tensor(ends)
        for arrange in (arrange_rows_ref, arrange_rows_triton):
            ends_WL1: Tensor = padded.to(device)[:, 3:] if arrange is arrange_rows_triton else padded[:, 3:]
            found = arrange(ends_WL1, status.to(ends_WL1.device), capacity)
            assert all(tensor.dtype == torch.int32 for tensor in found)
            assert found.ends_L.tolist() == expected_ends
            assert found.row_ids_R.shape == found.place_R.shape == (world * capacity,)
            assert found.row_ids_R.tolist() == expected_rows + [0] * (world * capacity - len(expected_rows))
            assert found.place_R[expected_rows].tolist() == list(range(len(expected_rows)))
            assert found.first_W.tolist() == [source * capacity for source in range(world)]
            sent = [last - first for first, last in zip(found.first_W.tolist(), found.last_W.tolist(), strict=True)]
            assert sent == [sum(counts) for counts in counts_WL]
            assert found.to_W.tolist() == starts_W
