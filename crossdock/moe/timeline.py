"""What ranks told of themselves as one Chrome trace: a process for each rank, its work, its waits, its rows in flight.

What is in flight overlaps, as the rows of several chunks do, and a row of the chart cannot hold that as plain events:
those must nest. So flights are pairs of asynchronous events, which viewers stack.
"""

from bisect import bisect_left, bisect_right
from typing import Any

from crossdock.moe.intervals import Stretch, flown_and_seen, hidden_fraction, union, without

MEANS = "of the time in which a rank's rows are in flight, the part in which it does not wait for rows or counts"


def chrome_trace(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What `Recorder.told` tells of each rank, in Chrome's trace event format (times in microseconds).

    A span ends where a wait inside it begins.
    """
    begins = [item[1] for told in ranks for kind in ("spans", "waits", "flights") for item in told[kind]]
    first = min(begins, default=0.0)

    def us(seconds: float) -> float:
        return round((seconds - first) * 1e6, 3)

    events: list[dict[str, Any]] = []
    for rank, told in enumerate(ranks):
        names = [("process_name", 0, f"rank {rank}"), ("thread_name", 0, "compute"), ("thread_name", 1, "waits")]
        events += [{"ph": "M", "name": n, "pid": rank, "tid": tid, "args": {"name": to}} for n, tid, to in names]
        waiting = union(tuple(stretch) for stretch in told["waiting"])
        pieces = [(0, name, piece) for name, *ends in told["spans"] for piece in _cut(ends[0], ends[1], waiting)]
        pieces += [(1, phase, (begin, end)) for phase, begin, end in told["waits"]]
        for tid, name, (begin, end) in pieces:
            at = {"ts": us(begin), "dur": round((end - begin) * 1e6, 3)}
            events.append({"ph": "X", "name": name, "pid": rank, "tid": tid} | at)
        for number, (phase, begin, end, size) in enumerate(told["flights"]):
            kind = phase.split(" of exchange")[0]
            same = {"name": f"{kind} in flight", "cat": kind, "id": f"{rank}.{number}", "pid": rank, "tid": 2}
            events.append(same | {"ph": "b", "ts": us(begin), "args": {"phase": phase, "bytes": size}})
            events.append(same | {"ph": "e", "ts": us(end)})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"hidden": _summary(ranks)}}


def _cut(begin: float, end: float, waiting: list[Stretch]) -> list[Stretch]:
    """The parts of a span in which the rank does not wait."""
    first, last = bisect_right(waiting, (begin, begin)) - 1, bisect_left(waiting, (end, end))
    return without([(begin, end)], waiting[max(first, 0) : last])


def _summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    by_rank = [flown_and_seen(told["in_flight"], told["waiting"]) for told in ranks]
    return {
        "fraction": hidden_fraction(by_rank),
        "by_rank": [hidden_fraction([one]) for one in by_rank],
        "means": MEANS,
        "flights": sum(len(told["flights"]) for told in ranks),
        "arrivals_seen_at_the_wait_only": sum(told["seen_at_wait"] for told in ranks),
        "is_cut_short": any(told["is_full"] for told in ranks),
    }
