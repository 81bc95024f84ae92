"""Rows over gloo: receives before sends, many exchanges at once, errors kept for who waits, threads that end."""

import threading
import time
from typing import Any

import pytest
import torch

from crossdock.comm import make_transport
from crossdock.comm.gloo_rows import IDLE_S, GlooRows
from crossdock.parallel import EPGroup, Topology
from tests.launch import Ranks


class Fake:
    """A backend that notes what it is asked for; `broken` is what its waits raise."""

    def __init__(self, broken: Exception | None = None) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.broken, self.may_end = broken, threading.Event()

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> "Fake":
        self.asked.append(("recv", peer, tag))
        return self

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> "Fake":
        self.asked.append(("send", peer, tag))
        return self

    def wait(self) -> None:
        self.may_end.wait(10.0)
        if self.broken is not None:
            raise self.broken


def begin(gloo: Any, sizes: tuple[int, ...], rank: int) -> tuple[GlooRows, list[torch.Tensor]]:
    sent = [torch.full((size, 2), rank, dtype=torch.uint8) for size in sizes]
    arrived = [torch.zeros(size, 2, dtype=torch.uint8) for size in sizes]
    return GlooRows(gloo, rank, sent, arrived, 7), arrived


def test_every_receive_stands_before_every_send() -> None:
    gloo, seen = Fake(), list[str]()
    moving, arrived = begin(gloo, (3, 1, 2, 0), 1)
    moving.on_arrival(lambda: seen.append("early"))
    assert not moving.poll(0.05) and not seen
    gloo.may_end.set()
    assert moving.poll(10.0) and moving.poll(0.0)
    assert gloo.asked == [(what, peer, 7) for what in ("recv", "send") for peer in (2, 0)], (
        "none to a rank without rows"
    )
    assert arrived[1].unique().tolist() == [1], "this rank's own"
    moving.on_arrival(lambda: seen.append("late"))
    deadline = time.monotonic() + 10.0
    while len(seen) < 2 and time.monotonic() < deadline:  # calls are made once the wait is over
        time.sleep(0.01)
    assert sorted(seen) == ["early", "late"]


def test_what_broke_is_raised_at_each_wait_and_has_not_arrived() -> None:
    gloo, seen = Fake(RuntimeError("closed by peer")), list[str]()
    moving, _ = begin(gloo, (1, 1), 0)
    moving.on_arrival(lambda: seen.append("early"))
    gloo.may_end.set()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed by peer"):
            moving.poll(10.0)
    moving.on_arrival(lambda: seen.append("late"))
    assert not seen


def test_threads_are_kept_for_the_next_exchange_and_then_end() -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "crossdock rows"]

    for _ in range(20):
        gloo = Fake()
        gloo.may_end.set()
        assert begin(gloo, (1, 1), 0)[0].poll(10.0)
        time.sleep(0.01)
    assert len(names()) <= 2
    deadline = time.monotonic() + 20 * IDLE_S
    while names() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not names()


def many(group: EPGroup, nodes: tuple[int, int]) -> bool:
    """Eight exchanges of other sizes at once and all by one name, on two transports over the same connections."""
    transports, right = [make_transport(group, "torch") for _ in range(2)], True
    for transport in transports:
        transport.topology = Topology(nodes)  # type: ignore[misc]  # a property of the protocol
    for turn in range(30):
        under_way = []
        for size in (1, 5000, 3, 0, 70000, 1, 2, 400):
            for number, transport in enumerate(transports):
                counts = [size + number] * 2
                rows = torch.full((2 * (size + number), 8), float(group.rank * 100 + turn + number))
                under_way.append((transport.all_to_all_rows(rows, counts, counts, "rows"), size + number, number))
        for pending, size, number in reversed(under_way):
            expected = torch.tensor([0.0, 100.0]).repeat_interleave(size)[:, None] + turn + number
            right = right and torch.equal(pending.wait(), expected.expand(-1, 8))
    return right


@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)])
def test_exchanges_under_way_at_once_are_not_mixed_up(ranks_of_two: Ranks, nodes: tuple[int, int]) -> None:
    """Inside a node by gloo's all-to-all, between nodes by `GlooRows`."""
    assert ranks_of_two.run(many, nodes) == [True, True]
