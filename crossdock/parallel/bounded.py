"""Work in a thread of its own that can be left behind: an end to calls into torch.distributed that have none.

c10d's store answers a client from the process of rank 0, and a client waits for that answer without a timeout, even
where that process is stopped.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """work(), begun in a thread that does not keep the process from ending."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self.error: BaseException | None = None
        self._results: list[T] = []
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._results.append(work())
        except BaseException as error:
            self.error = error

    def done(self, wait_s: float) -> bool:
        """Whether it has ended, in one way or the other, after at most `wait_s` seconds more."""
        self._thread.join(wait_s)
        return self.error is not None or bool(self._results)

    def result(self) -> T:
        """What it returned, or raises what it raised; only once it is done."""
        if self.error is not None:
            raise self.error
        return self._results[0]


def bounded(work: Callable[[], T], timeout_s: float) -> T:
    """work()'s result, or what it raised; TimeoutError where it has not ended after `timeout_s` seconds."""
    running = Background(work, "bounded")
    if not running.done(timeout_s):
        raise TimeoutError(f"not ended after {timeout_s:g} s")
    return running.result()
