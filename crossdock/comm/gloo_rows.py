"""`GlooRows`: rows under way between all ranks over gloo, each to and from each, receives before sends.

Gloo sends when the receiver has said over the same connection that it is ready. Its own all-to-all sends first: where a
peer was ready before, this rank's rows leave at once, and its own word that it is ready waits behind all of them, so
that the peer's come only when they have gone. Whoever comes second halves the link for both. Between two emulated nodes
of two ranks, 16 MB from each to its peer, for which a link of 97 MB/s needs 330 ms, took 334 to 636 ms by gloo's
all-to-all, most above 400, and 332 to 336 with receives first. Ranks of one node take gloo's own: memory carries both
ways at once, and small rows arrive sooner.

What gloo can be asked to wait for cannot be given up and left whole, so a thread waits for each exchange; it starts a
large one, too, as a send copies what the system takes at once. Threads are kept for the next exchange, and end when
there has been none for a while. `tag` is the exchange's own, whichever thread comes first. Rejected: one thread for all
exchanges, in which one that is there would wait for one that may depend on it.
"""

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor

SMALL_BYTES = 1 << 18  # that the caller sends itself
IDLE_S = 0.5  # that a thread stays without work
LEAVING_S = 1.0  # that a process waits for rows at its end

Work = Callable[[], None]


class GlooRows:
    """Begins to send sent[peer] and to fill arrived[peer], bytes both, for every rank; `gloo` is their backend."""

    def __init__(self, gloo: Any, rank: int, sent: Sequence[Tensor], arrived: Sequence[Tensor], tag: int) -> None:
        self.error: Exception | None = None
        self._done = threading.Event()
        self._calls: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        works: list[Any] = []
        begin = partial(_begin, works, [gloo], rank, sent, arrived, tag)
        has_begun = sum(piece.numel() for piece in sent) <= SMALL_BYTES
        if has_begun:
            self._try(begin)
        _in_thread(partial(self._move, begin, works, has_begun))
        arrived[rank].copy_(sent[rank])

    def _try(self, work: Work) -> None:
        try:
            work()
        except Exception as error:
            self.error = error.with_traceback(None)  # whose frames hold connections open

    def poll(self, seconds: float) -> bool:
        """Waits no longer than that, and says whether all has moved; raises what broke it."""
        if not self._done.wait(seconds):
            return False
        if self.error is not None:
            raise self.error
        return True

    def on_arrival(self, call: Callable[[], None]) -> None:
        """As of `Then`; what breaks has not arrived."""
        with self._lock:
            if not self._done.is_set():
                self._calls.append(call)
                return
        if self.error is None:
            call()

    def _move(self, begin: Work, works: list[Any], has_begun: bool) -> None:
        """`begin` holds the memory that gloo reads and writes until the works are done."""
        if not has_begun:
            self._try(begin)
        if self.error is None:
            self._try(partial(_wait, works))
        works.clear()  # they hold connections open
        with self._lock:
            self._done.set()
        if self.error is None:
            for call in self._calls:
                call()
        self._calls.clear()


def _begin(
    works: list[Any], backend: list[Any], rank: int, sent: Sequence[Tensor], arrived: Sequence[Tensor], tag: int
) -> None:
    """`backend` is emptied: connections close with the last reference."""
    gloo = backend.pop()
    peers = [(rank + step) % len(sent) for step in range(1, len(sent))]  # no rank is everybody's first
    works += [gloo.recv([arrived[peer]], peer, tag) for peer in peers if len(arrived[peer])]
    works += [gloo.send([sent[peer]], peer, tag) for peer in peers if len(sent[peer])]


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


_idle: list["SimpleQueue[Work]"] = []  # of threads without work
_lock = threading.Lock()
_busy = 0  # threads


def _in_thread(work: Work) -> None:
    """Runs work() in a thread that does not keep the process from ending."""
    global _busy
    with _lock:
        _busy += 1
        queue = _idle.pop() if _idle else None
    if queue is None:
        queue = SimpleQueue()
        threading.Thread(target=_serve, args=(queue,), name="crossdock rows", daemon=True).start()
    queue.put(work)


def _serve(queue: "SimpleQueue[Work]") -> None:
    global _busy
    while True:
        try:
            work = queue.get(timeout=IDLE_S)
        except Empty:
            with _lock:
                if queue in _idle:
                    _idle.remove(queue)
                    return
            continue  # it has just been given work
        try:
            work()
        finally:
            del work  # with the rows that it holds
            with _lock:
                _busy -= 1
        with _lock:
            _idle.append(queue)


@atexit.register
def _finish() -> None:
    """What is leaving may leave: for a moment, as it may be for a rank that is gone."""
    end = time.monotonic() + LEAVING_S
    while _busy and time.monotonic() < end:
        time.sleep(0.01)


def _forget() -> None:
    """In a forked child, which has none of these threads."""
    global _busy, _lock
    _busy, _lock = 0, threading.Lock()
    _idle.clear()


os.register_at_fork(after_in_child=_forget)
