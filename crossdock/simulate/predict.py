"""`predict`: the time of one layer under one schedule, what bounds it, and the bytes on each kind of link."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossdock.simulate.cluster import Cluster
from crossdock.simulate.cost import COMPUTE, EXCHANGES, Load
from crossdock.simulate.schedule import Program, Schedule, program
from crossdock.simulate.shape import LayerShape
from crossdock.simulate.timeline import Job, Timeline, run
from crossdock.simulate.traffic import Traffic

RESOURCES = ("inter", "intra", "processor", "host")
LATENCY = "latency"


@dataclass(frozen=True)
class LinkBytes:
    """Bytes of a layer on one kind of link in its busier direction: of the busiest link, of a mean one, of all."""

    max: int
    mean: float
    total: int


@dataclass(frozen=True)
class Prediction:
    """One layer.

    total_s     from the first stage to the last
    phase_s     seconds alone of all plan, dispatch, experts and combine stages; more than total_s where they overlap
    hidden      of the time in which rows travel, the part in which the processor works; None where none travel
    bytes       by kind of link: "self" (a rank to itself), "intra" (inside nodes), "inter" (between nodes)
    needs_s     seconds each resource is needed for at its busiest, and latencies: no schedule of these stages is faster
                than the largest
    critical    seconds of the longest chain, by stage, in order of first appearance; they add up to total_s
    """

    schedule: Schedule
    ranks: int
    nodes: int
    total_s: float
    phase_s: dict[str, float]
    hidden: float | None
    bytes: dict[str, LinkBytes]
    needs_s: dict[str, float]
    critical: dict[str, float]
    timeline: Timeline

    @property
    def bound(self) -> str:
        """The resource that is needed longest, or latency."""
        return max(self.needs_s, key=lambda name: self.needs_s[name])


def predict(
    chunks: Sequence[Traffic], shape: LayerShape, cluster: Cluster, schedule: Schedule, experts: bool = True
) -> Prediction:
    """A layer whose tokens are in `chunks` (as many as the schedule says); the exchange alone without `experts`."""
    assert len(chunks) == schedule.chunks, "one traffic for each chunk"
    written = program(chunks, shape, cluster, schedule, experts)
    jobs, timeline = written.jobs, run(written.jobs)
    needs_s = {name: sum(job.needs.get(name, 0.0) for job in jobs) for name in RESOURCES}
    phases = ("plan", "dispatch", "experts", "combine")
    flying = timeline.covered(EXCHANGES)
    return Prediction(
        schedule,
        chunks[0].ranks,
        chunks[0].nodes,
        timeline.total,
        {phase: sum(job.alone for job in jobs if job.phase == phase) for phase in phases},
        timeline.covered(EXCHANGES, frozenset({COMPUTE})) / flying if flying else None,
        _bytes(written),
        needs_s | {LATENCY: _longest_delay(jobs)},
        _critical(jobs, timeline),
        timeline,
    )


def _bytes(written: Program) -> dict[str, LinkBytes]:
    loads = [load for load in written.loads if load is not None]
    total = sum(loads[1:], loads[0]) if loads else Load(*(np.zeros((2, 1), dtype=np.int64),) * 3)
    kinds = {"self": total.local_W[None], "intra": total.intra_2W, "inter": total.inter_2I}
    return {
        name: LinkBytes(int(counts.max()), float(counts.mean(1).max()), int(counts.sum(1).max()))
        for name, counts in kinds.items()
    }


def _longest_delay(jobs: Sequence[Job]) -> float:
    """Of all latencies, the chain that must follow one another."""
    ends: list[float] = []
    last: dict[str, float] = {}
    for job in jobs:
        begin = max([last.get(job.lane, 0.0), *(ends[number] for number in job.after)])
        ends.append(begin + job.delay)
        last[job.lane] = ends[-1]
    return max(ends, default=0.0)


def _critical(jobs: Sequence[Job], timeline: Timeline) -> dict[str, float]:
    """Back from the last job, each time to the one whose end let it start."""
    spans = timeline.spans
    if not spans:
        return {}
    at = max(range(len(spans)), key=lambda number: spans[number].end)
    chain = [at]
    while spans[at].begin > 0.0:
        before = [number for number in range(at) if spans[number].lane == spans[at].lane]
        before = [*jobs[at].after, *before[-1:]]
        at = max(before, key=lambda number: spans[number].end)
        chain.append(at)
    found: dict[str, float] = {}
    for number in reversed(chain):
        name = spans[number].name
        found[name] = found.get(name, 0.0) + spans[number].end - spans[number].begin
    return found
