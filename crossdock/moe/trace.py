"""A timeline of MoE layers as Chrome trace JSON (chrome://tracing, ui.perfetto.dev), and how much traffic it hides.

    with traced(path, transport) as transport:          # nothing happens where path is None
        layer = MoELayer(config, transport)             # what is built on the transport is traced
        layer(x_TD)

Each rank is a process with rows of what it computes, what it waits for, and what is in flight by phase. Layers name
what they compute; the rest is seen by a transport that passes everything on to another (`Watched`), so that every
form of the exchange is traced alike. Without tracing none of it is there, and a layer's spans are empty contexts.

When rows have arrived is known where the transport's pending has `on_arrival(call)`, which calls as they do, on a GPU
within a stream that has just received them. Elsewhere arrival is seen at the wait, and the trace says of how many rows.
Times of a GPU are those of its events, and the waits those of the stream that computes. Rows in latency mode do without
the transport's calls, so of that mode only what is computed is told. Rejected: a thread that waits for each exchange,
as MPI and CUDA streams belong to the thread that started them.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossdock.comm.transport import Done, Pending, Transport
from crossdock.errors import ConfigError
from crossdock.moe.intervals import flown_and_seen, hidden_fraction, union
from crossdock.moe.timeline import chrome_trace

MOST = 200_000  # stretches of a rank; later ones are left out, and the trace says so


class HostClock:
    """Stamps of the host, in nanoseconds."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.perf_counter()

    def stamp(self) -> Any:
        return time.perf_counter_ns()

    def seconds(self, stamp: Any) -> float:
        """Since 1970, so that ranks on several machines share a scale, as well as their clocks agree."""
        return float(stamp) / 1e9 + self._offset_s


class DeviceClock:
    """Stamps are events of the stream that is current; `module` is torch.cuda or one with the same members."""

    def __init__(self, module: Any = torch.cuda) -> None:
        self._module = module
        self._first = self.stamp()
        self._first.synchronize()
        self._offset_s = time.time()

    def stamp(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, stamp: Any) -> float:
        """Since 1970; waits for the event."""
        stamp.synchronize()
        return float(self._first.elapsed_time(stamp)) / 1e3 + self._offset_s


@dataclass
class Flight:
    """Rows under way; `end` is None until they have arrived."""

    phase: str
    size: int
    begin: Any
    seen_arriving: bool
    end: Any = None

    def land(self, stamp: Any) -> None:
        """At the first call; a wait may be over before the thread that sees arrivals has its turn."""
        if self.end is None:
            self.end = stamp


class NoTrace:
    """Records nothing."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Something that is computed."""
        return _NOTHING

    def wait(self, phase: str) -> AbstractContextManager[None]:
        """A wait of what computes."""
        return _NOTHING


_NOTHING = nullcontext()
NO_TRACE = NoTrace()


@dataclass
class Recorder(NoTrace):
    """What one rank does, in stamps of its clock; nothing while it is `paused`."""

    clock: HostClock | DeviceClock = field(default_factory=HostClock)
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    waits: list[tuple[str, Any, Any]] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    paused: bool = False

    def span(self, name: str) -> AbstractContextManager[None]:
        return self._timed(name, self.spans) if self.is_recording else _NOTHING

    def wait(self, phase: str) -> AbstractContextManager[None]:
        return self._timed(phase, self.waits) if self.is_recording else _NOTHING

    @contextmanager
    def _timed(self, name: str, kept: list[tuple[str, Any, Any]]) -> Iterator[None]:
        begin = self.clock.stamp()
        yield
        if self.is_recording:
            kept.append((name, begin, self.clock.stamp()))

    @property
    def on_device(self) -> bool:
        return isinstance(self.clock, DeviceClock)

    @property
    def is_recording(self) -> bool:
        return not self.paused and not self.is_full

    @property
    def is_full(self) -> bool:
        return len(self.spans) + len(self.waits) + len(self.flights) >= MOST

    def clear(self) -> None:
        """Forgets everything so far, such as warm-up. Not to be called while rows are in flight."""
        for kept in (self.spans, self.waits, self.flights):
            kept.clear()

    def hidden(self) -> float | None:
        """This rank's `hidden_fraction`."""
        told = self.told()
        return hidden_fraction([flown_and_seen(told["in_flight"], told["waiting"])])

    def told(self) -> dict[str, Any]:
        """Everything in seconds, as plain lists."""
        seconds = self.clock.seconds
        arrived = [f for f in self.flights if f.end is not None]
        flights = [(f.phase, seconds(f.begin), seconds(f.end), f.size) for f in arrived]
        waits = [(phase, seconds(begin), seconds(end)) for phase, begin, end in self.waits]
        return {
            "spans": [(name, seconds(begin), seconds(end)) for name, begin, end in self.spans],
            "waits": waits,
            "flights": flights,
            "in_flight": union((begin, end) for _, begin, end, _ in flights),
            "waiting": union((begin, end) for _, begin, end in waits),
            "seen_at_wait": sum(not f.seen_arriving for f in arrived),
            "is_full": self.is_full,
        }


class Watched:
    """A transport that passes everything on to `inner` and tells `recorder` when rows leave and arrive."""

    def __init__(self, inner: Transport, recorder: Recorder) -> None:
        self.inner, self.recorder = inner, recorder
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size
        self.timeout_s, self.topology, self.members = inner.timeout_s, inner.topology, inner.members

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # whatever one transport has beyond the protocol

    def split(self, parts: Sequence[Sequence[int]]) -> "Watched":
        return Watched(self.inner.split(parts), self.recorder)

    def register(self) -> int:
        return self.inner.register()

    def abort(self, why: str) -> None:
        self.inner.abort(why)

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        with _waiting(self.recorder, phase):
            return self.inner.all_gather(values, phase)

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        recorder = self.recorder
        if not recorder.is_recording:
            return self.inner.all_to_all_rows(rows_SD, send_counts, recv_counts, phase)
        flight = Flight(phase, rows_SD.nbytes, recorder.clock.stamp(), seen_arriving=False)
        pending = self.inner.all_to_all_rows(rows_SD, send_counts, recv_counts, phase)
        if isinstance(pending, Done):  # nothing travels
            return pending
        recorder.flights.append(flight)
        on_arrival: Callable[[Callable[[], None]], None] | None = getattr(pending, "on_arrival", None)
        if on_arrival is not None:
            flight.seen_arriving = True
            on_arrival(lambda: flight.land(recorder.clock.stamp()))
        return _WatchedPending(pending, flight, recorder)


@dataclass(frozen=True)
class _WatchedPending:
    inner: Pending[Tensor]
    flight: Flight
    recorder: Recorder

    def wait(self) -> Tensor:
        with _waiting(self.recorder, self.flight.phase):
            rows_RD = self.inner.wait()
        self.flight.land(self.recorder.clock.stamp())
        return rows_RD


def _waiting(recorder: Recorder, phase: str) -> AbstractContextManager[None]:
    """On a GPU it is not the host whose waits count."""
    return _NOTHING if recorder.on_device else recorder.wait(phase)


def unwatched(transport: Transport) -> Transport:
    """For what does without a transport's calls."""
    return transport.inner if isinstance(transport, Watched) else transport


def recorder_of(transport: Transport) -> NoTrace:
    """Where what is built on the transport tells what it computes."""
    return transport.recorder if isinstance(transport, Watched) else NO_TRACE


@contextmanager
def traced(path: Path | None, transport: Transport, device: torch.device | None = None) -> Iterator[Transport]:
    """A transport to build layers on; their timeline is in `path` after the block, written by rank 0.

    `device` is that of the rows. A collective at its end, unless the block raises. Raises ConfigError where the file
    cannot be written: what the block has found is to be told inside it.
    """
    if path is None:
        yield transport
        return
    on_device = device is not None and device.type == "cuda"
    recorder = Recorder(DeviceClock() if on_device else HostClock())
    yield Watched(transport, recorder)
    write_trace(path, recorder, transport, device or torch.device("cpu"))


def write_trace(path: Path, recorder: Recorder, transport: Transport, device: torch.device) -> None:
    """Every rank's timeline into one file, by rank 0, over the memory that rows travel from. A collective."""
    told = json.dumps(recorder.told()).encode()
    sizes = [size for (size,) in transport.all_gather([len(told)], "sizes of traces")]
    to_first = [len(told)] + [0] * (transport.world_size - 1)
    expected = sizes if transport.rank == 0 else [0] * transport.world_size
    mine = torch.frombuffer(bytearray(told), dtype=torch.uint8)[:, None].to(device)
    rows = transport.all_to_all_rows(mine, to_first, expected, "traces").wait().cpu()
    if transport.rank:
        return
    ranks = [json.loads(part.numpy().tobytes()) for part in torch.split(rows, expected)]
    try:
        path.write_text(json.dumps(chrome_trace(ranks)))
    except OSError as error:
        raise ConfigError(f"the trace cannot be written to {path}: {error.strerror}") from error
