"""A link with a rate, for tests: rows arrive as late as they would over it, and meanwhile no processor is busy."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from crossdock.comm import Inbound, Pending, Transport


class Slow:
    """Another transport's rows, delivered one exchange after another at `s_a_byte` seconds for each byte received."""

    def __init__(self, inner: Transport, s_a_byte: float) -> None:
        self.inner, self.s_a_byte = inner, s_a_byte
        self.name, self.rank, self.world_size, self.timeout_s = "slow", inner.rank, inner.world_size, inner.timeout_s
        self.topology, self.members = inner.topology, inner.members
        self.link = ThreadPoolExecutor(1)  # takes exchanges in their order
        self.free_s = 0.0

    def split(self, parts: Sequence[Sequence[int]]) -> "Slow":
        return Slow(self.inner.split(parts), self.s_a_byte)

    def register(self) -> int:
        return self.inner.register()

    def abort(self, why: str) -> None:
        self.inner.abort(why)

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        return self.inner.all_gather(values, phase)

    def all_to_all_rows(self, rows_SD: Tensor, send: list[int], recv: list[int], phase: str) -> Pending[Tensor]:
        pending = self.inner.all_to_all_rows(rows_SD, send, recv, phase)
        far = sum(recv) - recv[self.rank]
        self.free_s = max(self.free_s, time.perf_counter()) + far * rows_SD[:1].nbytes * self.s_a_byte
        due_s = self.free_s

        def deliver() -> Tensor:
            rows_RD = pending.wait()
            time.sleep(max(0.0, due_s - time.perf_counter()))
            return rows_RD

        return Arriving(self.link.submit(deliver))


class Arriving:
    """A Pending that tells of its arrival."""

    def __init__(self, rows: "Future[Tensor]") -> None:
        self.rows = rows

    def on_arrival(self, call: Callable[[], None]) -> None:
        self.rows.add_done_callback(lambda _: call())

    def wait(self) -> Tensor:
        return self.rows.result()


class Asleep(nn.Module):
    """Experts, or shared experts, that take `s_a_row` seconds a row and give rows back as they are."""

    def __init__(self, s_a_row: float) -> None:
        super().__init__()
        self.s_a_row = s_a_row

    def forward(self, given: Inbound | Tensor) -> Tensor:
        rows = given if isinstance(given, Tensor) else given.decoded().in_order().rows_RD
        time.sleep(self.s_a_row * len(rows))
        return rows


class Noting:
    """A transport that passes everything on and notes the phases it was called in."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.notes = inner, list[str]()
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size
        self.timeout_s, self.topology, self.members = inner.timeout_s, inner.topology, inner.members
        self.register, self.split, self.abort = inner.register, inner.split, inner.abort
        self.thread = threading.get_ident()

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        self.notes.append(phase.split(" in MoE layer")[0])
        return self.inner.all_gather(values, phase)

    def all_to_all_rows(self, rows_SD: Tensor, send: list[int], recv: list[int], phase: str) -> Pending[Tensor]:
        assert threading.get_ident() == self.thread, "a collective was started by another thread"
        self.notes.append(phase.split(" in MoE layer")[0])
        return self.inner.all_to_all_rows(rows_SD, send, recv, phase)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3
