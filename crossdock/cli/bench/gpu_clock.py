"""How a call is timed on a GPU: as the replay of a CUDA graph between two events, with nothing of it in the L2 cache.

A graph takes the host's launching out of the figure, as engines do when they decode; about two microseconds of starting
it remain in. Between calls a buffer larger than any L2 is overwritten, which also keeps the queue full while the host
prepares the next call. Calls of a few microseconds, whose inputs were written just before in real use, are timed warm:
many in one graph, over their number.

Rejected: a profiler's sums of kernel times, which leave out the gaps between the kernels of one call.
"""

from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import torch

FLUSH_BYTES = 1 << 28
UNROLLED = 20  # calls in one graph where the cache stays warm
MEASURE_S = 0.15  # spent on each contender, about
MOST_ROUNDS, FEWEST_ROUNDS = 100, 5


class Times(dict[str, float]):
    """Seconds a call by contender; `eager` names those that could not be put into a graph."""

    eager: tuple[str, ...] = ()


class Clock(Protocol):
    """What `compare_on_gpu` needs of a device."""

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
        """(what to run in place of `call`, whether it is a graph)."""

    def seconds(self, run: Callable[[], Any], flush: bool) -> float:
        """Of one run."""


class GpuClock:
    """The clock of a CUDA (or ROCm) device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
        """A graph of the call, after a few runs that compile what it needs; itself where it waits for the device."""
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        if not self._never_waits(call):
            return call, False
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call()
        except Exception:  # whatever a call does that cannot be captured, it can still be run
            torch.cuda.synchronize(self.device)
            return call, False
        return graph.replay, True

    def _never_waits(self, call: Callable[[], Any]) -> bool:
        """Asked before capturing, as a capture that fails on a wait may leave torch's allocator believing in it."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return False
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return True

    def seconds(self, run: Callable[[], Any], flush: bool) -> float:
        """By two events on the device."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        if flush:
            self._flushed.zero_()
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


def compare_on_gpu(contenders: dict[str, Callable[[], Any]], clock: Clock, flush: bool = True) -> Times:
    """Median seconds of a call of each, in turn; cold (`flush`) or warm."""
    runs, eager = {}, []
    for name, call in contenders.items():
        runs[name], is_graph = clock.record(call if flush else _repeated(call))
        if not is_graph:
            eager.append(name)
    once = sum(clock.seconds(run, flush) for run in runs.values())
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, round(MEASURE_S * len(runs) / max(once, 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(clock.seconds(run, flush))
    found = Times({name: median(times) / (1 if flush else UNROLLED) for name, times in taken.items()})
    found.eager = tuple(eager)
    return found


def _repeated(call: Callable[[], Any]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(UNROLLED):
            call()

    return calls
