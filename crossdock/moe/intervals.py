"""Stretches of time: their union, what two sets of them share, and the part of traffic that computing hides.

A set of stretches is a list of (begin, end); lengths add up only after `union`, as rows of several chunks may be in
flight at once.
"""

from bisect import bisect_right
from collections.abc import Iterable

Stretch = tuple[float, float]


def union(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same time as stretches that neither touch nor overlap, ascending; empty ones are gone.

    >>> union([(4, 6), (0, 2), (1, 3), (6, 7), (9, 9)])
    [(0, 3), (4, 7)]
    """
    merged: list[Stretch] = []
    for begin, end in sorted(stretches):
        if end <= begin:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def shared(some: Iterable[Stretch], others: Iterable[Stretch]) -> list[Stretch]:
    """The time that lies in both.

    >>> shared([(0, 4), (6, 9)], [(3, 7), (8, 8.5)])
    [(3, 4), (6, 7), (8, 8.5)]
    """
    left, right = union(some), union(others)
    found: list[Stretch] = []
    at = of = 0
    while at < len(left) and of < len(right):
        begin, end = max(left[at][0], right[of][0]), min(left[at][1], right[of][1])
        if begin < end:
            found.append((begin, end))
        if left[at][1] < right[of][1]:
            at += 1
        else:
            of += 1
    return found


def without(some: Iterable[Stretch], others: Iterable[Stretch]) -> list[Stretch]:
    """The time that lies in the first and not in the second.

    >>> without([(0, 10)], [(2, 3), (5, 20)])
    [(0, 2), (3, 5)]
    """
    left: list[Stretch] = []
    taken = union(others)
    ends = [end for _, end in taken]
    for begin, end in union(some):
        for cut_begin, cut_end in taken[bisect_right(ends, begin) :]:
            if cut_begin >= end:
                break
            left.append((begin, cut_begin))
            begin = cut_end
        left.append((begin, end))
    return union(left)


def length(stretches: Iterable[Stretch]) -> float:
    """How long they are together, what several cover counted once."""
    return sum(end - begin for begin, end in union(stretches))


def flown_and_seen(flights: Iterable[Stretch], waits: Iterable[Stretch]) -> tuple[float, float]:
    """The time in which a rank's rows are in flight, and the part of it in which it waits.

    In flight is from handing rows over until the last of those expected has arrived, so a peer that sends late counts
    as traffic. Where a transport does not tell of arrivals, rows count as in flight until the wait that finds them, and
    more of the traffic seems hidden than is. Packing rows and putting them in order count as computing: a processor
    does them.

    >>> flown_and_seen([(0, 4), (2, 8)], [(0, 1), (7, 9)])
    (8, 2)
    """
    flying = union(flights)
    return length(flying), length(shared(flying, waits))


def hidden_fraction(ranks: Iterable[tuple[float, float]]) -> float | None:
    """Of the time in which rows are in flight, the part in which their ranks do not wait; None where none flew.

    `ranks` are what `flown_and_seen` gives for each, in any unit.

    >>> hidden_fraction([(8, 2), (0, 0), (2, 2)])
    0.6
    """
    pairs = list(ranks)
    flown, seen = (sum(pair[part] for pair in pairs) for part in (0, 1))
    return 1.0 - seen / flown if flown else None


def hidden_by_core(cores_per_rank: float, took: float, worked: float, flown: float) -> float | None:
    """Of the cores' time in which rows are in flight, the part that is worked; None where none flew.

    Where ranks share cores, one that waits leaves its core to another, and nothing is lost by it. `took`, `worked` and
    `flown` are sums over the ranks, in one unit: how long each was at it, the work of its process, and how long its
    rows flew. What the kernel does for nobody counts as idle, and so do waits for a rank that has more to do.

    Two ranks on a core, each at it for 10, at work for 4.5 and its rows in flight for 8:

    >>> hidden_by_core(0.5, 20, 9, 16)
    0.875
    """
    idle = max(cores_per_rank * took - worked, 0.0)
    return max(1.0 - idle / (cores_per_rank * flown), 0.0) if flown else None
