"""Exchanges beside what computes: which stream waits for which, and that layers share one."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crossdock.comm.transport import Then
from crossdock.moe.streams import Beside
from crossdock.moe.trace import NO_TRACE


class Streams:
    """What `Beside` needs of torch.cuda, noting which stream waits for which, and what is launched on which."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.now = self.Stream(torch.device("cpu"), "main")

    def Stream(self, device: torch.device, name: str = "side") -> Any:
        stream = SimpleNamespace(name=name)
        stream.wait_stream = lambda other: self.notes.append(f"{name} waits for {other.name}")
        return stream

    def current_stream(self, device: torch.device) -> Any:
        return self.now

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def current_device(self) -> int:
        return 1


def test_exchanges_run_beside_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    note = streams.notes.append
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: note(f"{int(self)} kept for {stream.name}"))
    beside = Beside(torch.device("cpu"), NO_TRACE, streams)

    def launch(what: str, value: Any) -> Any:
        note(f"{what} on {streams.now.name}")
        return value

    received = Then(lambda: launch("receive", torch.tensor(2)))
    pending = beside.start(lambda: launch("send", received), torch.tensor(1), None)
    note("products")
    assert int(beside.finish(pending)) == 2
    assert streams.notes == [
        "side waits for main", "1 kept for side", "send on side", "products", "receive on side", "main waits for side",
        "2 kept for main"]  # fmt: skip


def test_layers_share_a_devices_side_stream() -> None:
    """A transport may receive one layer's rows on the stream of another: it has to be one that both wait for."""
    streams = Streams()
    first, second, other = (Beside(torch.device(name), NO_TRACE, streams) for name in ("cpu:1", "cpu", "cpu:0"))
    assert first.side is second.side, "the current device is the first's"
    assert first.side is not other.side
