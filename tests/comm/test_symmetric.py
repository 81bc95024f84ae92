"""The symmetric transport between processes: the oracle's bits, order, growth, disagreement, death, what is left."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.comm import TorchTransport
from crossdock.comm.one_sided import as_units
from crossdock.comm.symmetric import BUFFERS, SymmetricTransport
from crossdock.comm.symmetric_heap import SymmetricHeap
from crossdock.parallel import EPGroup, Topology
from tests.comm.cases import Case, cases, exchange, oracle
from tests.comm.one_after_another import errors_of
from tests.launch import RankError, Ranks, solo

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def join(group: EPGroup, device: str = "cpu") -> SymmetricTransport:
    """The transport of `group`'s ranks; on "cuda" all of them share the one GPU."""
    if device == "cuda":
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        group = replace(group, device=torch.device("cuda", 0))
    return SymmetricTransport(group)


def run_cases(group: EPGroup, todo: list[Case]) -> list[dict[str, Tensor]]:
    transport = join(group)
    return [exchange(transport, case) for case in todo]


def check_cases(todo: list[Case], by_rank: list[list[dict[str, Tensor]]]) -> None:
    for number, case in enumerate(todo):
        for rank, want in enumerate(oracle(case)):
            for key, expected in want.items():
                have, where = by_rank[rank][number][key], f"{case.name}, rank {rank} of {case.world_size}, {key}"
                assert have.dtype == expected.dtype and have.shape == expected.shape, where
                if key == "dweights_TK":  # a sum over D, whose order is the reduction's own
                    torch.testing.assert_close(have, expected, rtol=1e-5, atol=1e-5, msg=where)
                else:
                    assert torch.equal(have, expected), where


def test_every_case_to_the_bit_alone() -> None:
    check_cases(cases(1), [solo(run_cases, cases(1))])


def test_every_case_to_the_bit_two(ranks_of_two: Ranks) -> None:
    check_cases(cases(2), ranks_of_two.run(run_cases, cases(2)))


def test_every_case_to_the_bit_three() -> None:
    with Ranks(3) as ranks:
        check_cases(cases(3), ranks.run(run_cases, cases(3)))


def test_every_case_to_the_bit_four(ranks_of_four: Ranks) -> None:
    check_cases(cases(4), ranks_of_four.run(run_cases, cases(4)))


def piece(turn: int, source: int, target: int, width: int, dtype: torch.dtype) -> Tensor:
    """What `source` sends `target` in exchange `turn`: as many rows as these numbers say, of bits that name them."""
    rows = (3 * turn + 2 * source + 5 * target) % 7
    generator = torch.Generator().manual_seed(turn * 100 + source * 10 + target)
    return torch.randint(0, 256, (rows, width * dtype.itemsize), generator=generator).to(torch.uint8).view(dtype)


def start(transport: SymmetricTransport, turn: int, width: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    ranks, device = range(transport.world_size), transport.device
    sent = [piece(turn, transport.rank, target, width, dtype) for target in ranks]
    received = [len(piece(turn, source, transport.rank, width, dtype)) for source in ranks]
    rows = torch.cat([rows.view(torch.uint8) for rows in sent]).view(dtype).to(device)
    return transport.all_to_all_rows(rows, [len(rows) for rows in sent], received, f"exchange {turn}").wait


def check_piece(transport: SymmetricTransport, turn: int, width: int, dtype: torch.dtype, found: Tensor) -> None:
    sources = range(transport.world_size)
    expected = torch.cat([piece(turn, s, transport.rank, width, dtype).view(torch.uint8) for s in sources])
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8).cpu(), expected), (turn, width, dtype)


def many_in_flight(group: EPGroup, device: str) -> None:
    """Started together, waited for in another order, more of them than there are boxes; each rank at its pace."""
    transport = join(group, device)
    for number in (1, 2, 3, BUFFERS + 3):
        waits = [start(transport, turn, 5, torch.int32) for turn in range(number)]
        time.sleep(0.01 * transport.rank)
        for turn in sorted(range(number), key=lambda turn: (turn * 5 + 2) % number):
            check_piece(transport, turn, 5, torch.int32, waits[turn]())


def test_several_in_flight(ranks_of_two: Ranks) -> None:
    ranks_of_two.run(many_in_flight, "cpu")


def growing(group: EPGroup, device: str) -> list[int]:
    """Rows of more and more bytes, two exchanges under way where regions have to grow; then small ones again."""
    transport, regions = join(group, device), []
    for width in (1, 500, 2000, 60_000, 3):
        waits = [start(transport, turn, width, torch.uint8) for turn in (0, 1)]
        for turn, wait in enumerate(waits):
            check_piece(transport, turn, width, torch.uint8, wait())
        regions.append(transport._boxes[0].box.region_bytes)
    return regions


def test_regions_grow_while_rows_are_under_way(ranks_of_two: Ranks) -> None:
    for regions in ranks_of_two.run(growing, "cpu"):
        assert regions == sorted(regions) and regions[0] == 4096 and regions[-1] >= 6 * 60_000


DTYPES = (torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float64)


def any_width(group: EPGroup, device: str) -> None:
    transport = join(group, device)
    for turn, dtype in enumerate(DTYPES):
        for width in (1, 3, 13, 64) if turn else (0, 1, 3, 13, 64):
            check_piece(transport, turn, width, dtype, start(transport, turn, width, dtype)())


def test_any_dtype_and_width(ranks_of_two: Ranks) -> None:
    ranks_of_two.run(any_width, "cpu")


def stale(group: EPGroup, device: str) -> None:
    """All regions full of 0xFF before each exchange, which NaN is: nothing of it may come out."""
    transport = join(group, device)
    check_piece(transport, 0, 40, torch.float32, start(transport, 0, 40, torch.float32)())
    for turn in range(1, 2 * BUFFERS):
        for box in transport._boxes:
            for source in range(transport.world_size):
                box.rows(source, (box.box.region_bytes,), torch.uint8).fill_(0xFF)
        if device == "cuda":
            torch.cuda.synchronize()
        transport.all_gather([0], "poisoned")
        check_piece(transport, turn, 40, torch.float32, start(transport, turn, 40, torch.float32)())


def test_nothing_stale_comes_out(ranks_of_two: Ranks) -> None:
    ranks_of_two.run(stale, "cpu")


def halves(group: EPGroup) -> list[Any]:
    """Ranks 0 and 2, ranks 1 and 3: exchanges of the parts run beside one of the whole."""
    whole = join(group)
    part = whole.split([[0, 2], [1, 3]])
    assert isinstance(part, SymmetricTransport)
    waiting = start(whole, 1, 3, torch.int16)
    check_piece(part, 2, 3, torch.int16, start(part, 2, 3, torch.int16)())
    check_piece(whole, 1, 3, torch.int16, waiting())
    return [part.members, part.rank, part.topology.num_nodes]


def over_nodes(group: EPGroup) -> list[str]:
    """Each rank's parts inside its node and across nodes, of two pretended nodes."""
    whole = join(replace(group, topology=Topology((0, 0, 1, 1))))
    inside, across = whole.split([[0, 1], [2, 3]]), whole.split([[0, 2], [1, 3]])
    assert isinstance(across, TorchTransport)
    return [inside.name, across.name]


def test_parts(ranks_of_four: Ranks) -> None:
    found = ranks_of_four.run(halves)
    assert found == [[(0, 2), 0, 1], [(1, 3), 0, 1], [(0, 2), 1, 1], [(1, 3), 1, 1]]
    assert ranks_of_four.run(over_nodes) == [["symmetric", "torch"]] * 4


def other_exchange(group: EPGroup, what: str) -> None:
    transport = join(group)
    start(transport, 0, 2, torch.int32)()
    mine = transport.rank == 1
    rows, phase = 3 if mine and what == "rows" else 2, "combine" if mine and what == "phase" else "dispatch"
    width = 5 if mine and what == "bytes" else 4
    sent = torch.ones(3 * rows, width, dtype=torch.uint8)
    pending = transport.all_to_all_rows(sent, [rows] * 3, [2, rows if mine else 2, 2], phase)
    time.sleep(0.5 * (transport.rank == 0))  # so that another finds out first
    pending.wait()
    transport.all_gather([0], phase)  # whom nothing strikes learns it here


ELSEWHERE = {
    "phase": "rank 1 is elsewhere: combine",
    "rows": "rank 1 sends 3 rows of 4 bytes, expected 2",
    "bytes": "rank 1 sends rows of 5 bytes, expected 4",
}


def test_ranks_in_different_exchanges_are_named_by_every_rank() -> None:
    """It is the group's failure, so that nobody calls the rank lost that found out and has gone on."""
    with Ranks(3) as ranks:
        said = ranks.run(errors_of, [partial(other_exchange, what=what) for what in ELSEWHERE])
    for number, (what, text) in enumerate(ELSEWHERE.items()):
        for rank, errors in enumerate(said):
            phase = "combine" if rank == 1 and what == "phase" else "dispatch"
            assert errors[number].startswith(f"PlanMismatch: rank {rank}: {phase}: ") and text in errors[number]


def absent(group: EPGroup, phase: str, how: str) -> str:
    """Rank 1 does not come to `phase`; returns how long the others waited, where that is no error."""
    transport = join(group)
    start(transport, 0, 2, torch.int32)()
    assert "/dev/shm/" not in _maps()  # so that nothing is left there, whatever happens
    if transport.rank == 1:
        if how == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "aborts":
            transport.abort("not hungry")
            return ""
        time.sleep(9.0)
        return ""
    transport.all_to_all_rows(torch.ones(3, 2), [1, 1, 1], [1, 1, 1], phase).wait()
    return "arrived"


@pytest.mark.parametrize(("how", "kind"), [("dead", "RankFailure"), ("late", "CommTimeout"), ("aborts", "RankFailure")])
def test_a_rank_that_does_not_come_is_named_by_every_other(how: str, kind: str) -> None:
    with Ranks(3, timeout_s=5 if how == "late" else 60) as ranks:
        began = time.monotonic()
        with pytest.raises(RankError) as caught:
            ranks.run(absent, "lunch", how)
        assert time.monotonic() - began < 40
    assert caught.value.kinds[0] == caught.value.kinds[2] == kind
    for rank in (0, 2):
        (line,) = (line for line in str(caught.value).splitlines() if line.startswith(f"rank {rank}: {kind}"))
        assert f"rank {rank}: lunch: " in line and "rank 1 " in line


def shared_memory(group: EPGroup) -> tuple[int, int]:
    """What one rank writes another reads; how much memory the process maps under the heap's name, then without it."""
    transport = join(group)
    heap = SymmetricHeap.open(transport.control, torch.device("cpu"), 5000, "test")
    assert heap.peers[0].shape == (8192,) and not heap.peers[transport.rank].any()
    transport.all_gather([0], "zeroed")
    for peer in range(transport.world_size):
        heap.view(peer, 128 + 8 * transport.rank, (1,), torch.int64).fill_(10 * peer + transport.rank)
    transport.all_gather([0], "written")
    expected = [10 * transport.rank + source for source in range(transport.world_size)]
    assert heap.view(transport.rank, 128, (transport.world_size,), torch.int64).tolist() == expected
    assert as_units(heap.peers[0][128:].view(-1, 8)[:2]).dtype == torch.int64
    mapped = _maps().count("memfd:crossdock")
    assert "/dev/shm/" not in _maps()
    del heap
    return mapped, _maps().count("memfd:crossdock")


def _maps() -> str:
    with open("/proc/self/maps") as file:
        return file.read()


def test_memory_has_no_name_and_is_let_go_of(ranks_of_two: Ranks) -> None:
    for mapped, left in ranks_of_two.run(shared_memory):
        assert mapped - left == 2


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_processes_on_one_gpu(world_size: int) -> None:
    with Ranks(world_size) as ranks:
        for fn in (many_in_flight, growing, any_width, stale):
            ranks.run(fn, "cuda")
