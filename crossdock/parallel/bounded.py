"""`bounded`: an end to calls into torch.distributed that have none, because the process at the other end is stopped.

c10d's store answers a client from the process of rank 0, and a client waits for that answer without a timeout.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def bounded(work: Callable[[], T], timeout_s: float) -> T:
    """work()'s result, or what it raised; TimeoutError where it has not ended after `timeout_s` seconds.

    The work runs in a thread of its own, which is then left behind, and does not keep the process from ending.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="bounded", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"not ended after {timeout_s:g} s")
    return results[0]
