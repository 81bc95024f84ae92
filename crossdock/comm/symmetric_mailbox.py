"""`Mailbox`: a box in every rank's memory, sending to all of them, and the host's wait for what they sent.

The host looks at the counters first, which on a CPU costs a microsecond where an interpreted kernel costs a thousand,
and launches the waiting kernel once it has seen all of them: what the kernel acquires is what counts. How long a wait
may be, and who is to blame for it, is the group's `Watch`'s to say, as for every transport.

Legend: W ranks.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from crossdock.comm.one_sided import PROGRAMS, Box, Parcel, push_rows_triton
from crossdock.comm.one_sided_wait import MISSING, STATUS, Awaited, wait_signals_triton
from crossdock.comm.symmetric_heap import SymmetricHeap
from crossdock.comm.torch_dist import TorchTransport
from crossdock.comm.transport import Transport
from crossdock.errors import CrossdockError
from crossdock.parallel.standing import Failure, Turn

POLLS = {"cpu": 1, "cuda": 1 << 15}  # of one launch while the host waits: some tens of milliseconds on a GPU
SHORTEST_S, LONGEST_S = 2e-5, 1e-3  # pauses of a host that looks


class Watching(Protocol):
    """What `parallel.watch.Watch` does: `rank` is this one's number in the world, and `fail` ends its group."""

    rank: int

    def fail(self, failure: Failure) -> Failure: ...


class Line(Protocol):
    """What `parallel.watch.Channel` does: numbers this rank's exchanges, and ends waits that cannot end well."""

    @property
    def watch(self) -> Watching: ...

    def enter(self, phase: str) -> Turn: ...

    def wait(self, turn: Turn, poll: Callable[[float], bool]) -> None: ...


class Alone:
    """The line of a world of one, where whatever is sent has arrived, and its watch, which has nobody to tell."""

    rank = 0

    def __init__(self, control: Transport) -> None:
        self._control = control
        self._failure: Failure | None = None

    @property
    def watch(self) -> Watching:
        return self

    def fail(self, failure: Failure) -> Failure:
        self._failure = self._failure or failure
        return self._failure

    def enter(self, phase: str) -> Turn:
        self._control.all_gather([0], phase)  # raises after an abort
        if self._failure is not None:
            raise self._failure.error(0, phase)
        return Turn(0, phase, time.monotonic())

    def wait(self, turn: Turn, poll: Callable[[float], bool]) -> None:
        if not poll(self._control.timeout_s):
            raise ended(self, Failure("stuck", (), "its own signal did not come", 0), turn.phase)


def make_line(control: Transport) -> Line:
    """A line beside that of `control`'s own collectives, for the same ranks."""
    if not isinstance(control, TorchTransport):
        return Alone(control)
    beside = control._channel
    return beside.watch.channel(f"{beside.name}, symmetric", control.members, control.timeout_s)


def ended(line: Line, failure: Failure, phase: str) -> CrossdockError:
    """The error to raise for the group's failure, which is this one unless it had one before."""
    return line.watch.fail(failure).error(line.watch.rank, phase)


class Mailbox:
    """All ranks make it with the same `box` of the same heap. `status` is what waits found, cleared by `receive`."""

    def __init__(self, heap: SymmetricHeap, box: Box) -> None:
        self.heap, self.box, world = heap, box, len(heap.peers)
        self.kind = heap.device.type
        self.programs = PROGRAMS[self.kind]
        self.consumed_W = torch.zeros(world, dtype=torch.int64, device=heap.device)
        self.status = torch.zeros(world + 1, STATUS, dtype=torch.int64, device=heap.device)
        self.messages = heap.view(heap.rank, box.messages_at, (world, box.message_words), torch.int64)
        self._signals_W = heap.view(heap.rank, box.at, (world,), torch.int64)

    def rows(self, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of `shape` values, from the beginning of the region for what `source` sends here."""
        return self.heap.view(self.heap.rank, self.box.rows_at + source * self.box.region_step, shape, dtype)

    def send(self, parcel: Parcel) -> None:
        """On a GPU, started on the current stream."""
        push_rows_triton(parcel, self.box, self.heap, self.programs)

    def await_on_device(self, awaited: Awaited, polls: int, retry: int = 0) -> None:
        """Has the device wait on the current stream; `status` says what it found, 0 where all is well."""
        wait_signals_triton(awaited, self.box, self.heap, self.programs, self.consumed_W, self.status, retry, polls)

    def receive(self, awaited: Awaited, line: Line, turn: Turn) -> list[list[int]]:
        """Has the host wait until all ranks have sent; the status of each. Raises what the line's waits raise."""
        found: list[list[int]] = []

        def poll(seconds: float) -> bool:
            until, pause = time.monotonic() + seconds, SHORTEST_S
            while self.kind == "cpu" and not self._all_sent():
                if time.monotonic() > until:
                    return False
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_S)
            self.await_on_device(awaited, POLLS[self.kind], retry=int(bool(found)))
            found[:] = self.status.tolist()
            return all(what != MISSING for what, *_ in found[:-1])

        line.wait(turn, poll)
        if found[-1][0]:
            self.status.zero_()
        return found[:-1]

    def _all_sent(self) -> bool:
        return bool((self._signals_W - self.consumed_W >= self.programs).all())
