"""A small discrete-event simulation: jobs in lanes that share resources.

A lane does its jobs one after another, in the order given, as a stream or a communicator does. Different lanes run at
the same time and share each resource they all need evenly: two jobs that would take 3 ms of a processor alone take 6 ms
together. A job first waits `delay` seconds, which needs nothing (a latency), and ends when it has had all it needs of
every resource. Between two events the shares are constant, so the next event is found, not stepped to.

What was rejected: a resource that serves one job at a time. Bytes of a collective and products of a layer do share
cores and memory in reality, and one after the other would decide by the order of the list which of them was hidden.

>>> line = run([Job("rows", "wire", {"link": 2.0}), Job("product", "compute", {"core": 3.0}),
...             Job("sum", "compute", {"core": 1.0}, after=(0, 1))])
>>> [(span.name, span.begin, span.end) for span in line.spans]
[('rows', 0.0, 2.0), ('product', 0.0, 3.0), ('sum', 3.0, 4.0)]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

TINY = 1e-12  # of a job's seconds: less than this is rounding


@dataclass(frozen=True)
class Job:
    """`needs`: seconds of each resource if it were alone there. `after`: numbers of jobs that must have ended."""

    name: str
    lane: str
    needs: Mapping[str, float]
    delay: float = 0.0
    after: tuple[int, ...] = ()
    phase: str = ""
    chunk: int = 0

    @property
    def alone(self) -> float:
        """Seconds with nothing else under way."""
        return self.delay + max(self.needs.values(), default=0.0)


@dataclass(frozen=True)
class Span:
    """When a job ran, in seconds."""

    name: str
    lane: str
    phase: str
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One span for each job, in the jobs' order."""

    spans: tuple[Span, ...]

    @property
    def total(self) -> float:
        return max((span.end for span in self.spans), default=0.0)

    def covered(self, lanes: frozenset[str], by: frozenset[str] | None = None) -> float:
        """Seconds in which some job of `lanes` runs; of these, where `by` is given, those in which one of `by` does."""
        total = 0.0
        edges = sorted({edge for span in self.spans for edge in (span.begin, span.end)})
        for begin, end in pairwise(edges):
            running = {span.lane for span in self.spans if span.begin <= begin and span.end >= end}
            if running & lanes and (by is None or running & by):
                total += end - begin
        return total


@dataclass
class _Running:
    """What is left of a job under way."""

    number: int
    begin: float
    delay: float
    left: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.delay <= 0.0 and not self.left


def run(jobs: Sequence[Job]) -> Timeline:
    """When each job runs. ValueError where jobs wait for one another in a circle."""
    lanes: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        lanes.setdefault(job.lane, []).append(number)
    spans: dict[int, Span] = {}
    active: list[_Running] = []
    now = 0.0
    while len(spans) < len(jobs):
        _start(jobs, lanes, spans, active, now)
        if not active:
            raise ValueError("jobs wait for one another in a circle")
        now += _advance(active)
        for running in [running for running in active if running.done]:
            job = jobs[running.number]
            spans[running.number] = Span(job.name, job.lane, job.phase, running.begin, now)
            lanes[job.lane].remove(running.number)
            active.remove(running)
    return Timeline(tuple(spans[number] for number in range(len(jobs))))


def _start(
    jobs: Sequence[Job], lanes: dict[str, list[int]], spans: dict[int, Span], active: list[_Running], now: float
) -> None:
    """Adds the first job of each lane that is free, where what it comes after has ended."""
    busy = {running.number for running in active}
    for waiting in lanes.values():
        if waiting and waiting[0] not in busy and all(number in spans for number in jobs[waiting[0]].after):
            job = jobs[waiting[0]]
            needs = {name: seconds for name, seconds in job.needs.items() if seconds > 0.0}
            active.append(_Running(waiting[0], now, job.delay, needs))


def _advance(active: list[_Running]) -> float:
    """Moves on to the next event; the seconds until then."""
    sharing: dict[str, int] = {}
    for running in active:
        if running.delay <= 0.0:
            for name in running.left:
                sharing[name] = sharing.get(name, 0) + 1
    step = min(
        running.delay
        if running.delay > 0.0
        else min((seconds * sharing[name] for name, seconds in running.left.items()), default=0.0)
        for running in active
    )
    for running in active:
        if running.delay > 0.0:
            running.delay = running.delay - step if running.delay - step > TINY * step else 0.0
            continue
        for name in list(running.left):
            running.left[name] -= step / sharing[name]
            if running.left[name] <= TINY * (1.0 + step):
                del running.left[name]
    return step
