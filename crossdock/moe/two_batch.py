"""Two-batch overlap: while one half of a batch waits for its rows, the other half attends, and the other way round.

    steps = [layers(half) for half in halves]       # generators that pause where their rows are in flight
    y = interleave(steps)                           # each in turn until its next pause

A generator is what a thread would be, without its freedom: halves always change places at the same points, so that all
ranks start their exchanges in the same order, which collectives need. For the same reason every rank takes part with
two halves, one of them empty where it has a single sequence. A half's bits are those of the whole batch, because no
row's depend on its company.
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]  # pauses where rows are in flight and other work may run


def run(steps: Steps[T]) -> T:
    """What the steps return, without pauses."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: T = end.value
        return result


def interleave(steps: Sequence[Steps[T]]) -> list[T]:
    """What each of the steps returns; they run in turn, each until its next pause.

    Where one raises, the others are closed and the error is passed on.
    """
    results: dict[int, T] = {}
    try:
        while len(results) < len(steps):
            for number, of_batch in enumerate(steps):
                if number in results:
                    continue
                try:
                    next(of_batch)
                except StopIteration as end:
                    results[number] = end.value
    finally:
        for of_batch in steps:
            of_batch.close()
    return [results[number] for number in range(len(steps))]
