"""How much of the time for which a layer's rows are under way is hidden by its products."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from crossdock.comm import Transport
from crossdock.moe.intervals import flown_and_seen, hidden_by_core, hidden_fraction
from crossdock.moe.trace import Recorder

CALLS = 3  # that are watched; the median counts


@dataclass(frozen=True)
class Flights:
    """hidden: of the time in which rows fly, the part for which their ranks do not wait, over all ranks;
    hidden_of_busiest: the same of the rank with most rows, which the others wait for whatever the links;
    hidden_of_cores: by core. None where no rows fly. unseen: flights whose arrival was seen no sooner than at the wait,
    which makes the parts too large. busy: processor cores at work, over all ranks and on average.
    """

    hidden: float | None
    hidden_of_busiest: float | None
    hidden_of_cores: float | None
    unseen: int
    busy: float


def watch_flights(
    layer: Callable[[], Any],
    recorder: Recorder,
    transport: Transport,
    busiest: int,
    cores_per_rank: float | None,
) -> Flights:
    """Of CALLS calls after a first one; a collective of all ranks, of which `busiest` has most rows.

    `cores_per_rank` is None where products do not run on cores.
    """
    layer()
    calls = [_watch(layer, recorder, transport) for _ in range(CALLS)]
    whole = [tuple(map(sum, zip(*ranks, strict=True))) for ranks in calls]
    by_core = [cores_per_rank and hidden_by_core(cores_per_rank, *sums[:3]) for sums in whole]
    return Flights(
        _median([hidden_fraction([(sums[2], sums[3])]) for sums in whole]),
        _median([hidden_fraction([(ranks[busiest][2], ranks[busiest][3])]) for ranks in calls]),
        _median(by_core),
        sum(sums[4] for sums in whole),
        median(sums[1] / sums[0] for sums in whole) * transport.world_size,
    )


def _watch(layer: Callable[[], Any], recorder: Recorder, transport: Transport) -> list[tuple[int, int, int, int, int]]:
    """By rank: nanoseconds that the call took, for which any core worked for it, in which rows flew, and of these those
    in which the rank waited; and flights whose arrival was only seen at the wait."""
    transport.all_gather([0], "bench start")
    recorder.clear()
    recorder.paused = False
    began_s, began_work_s = time.perf_counter(), time.process_time()
    layer()
    took_s, worked_s = time.perf_counter() - began_s, time.process_time() - began_work_s
    recorder.paused = True
    told = recorder.told()
    flown_s, seen_s = flown_and_seen(told["in_flight"], told["waiting"])
    mine = [round(seconds * 1e9) for seconds in (took_s, worked_s, flown_s, seen_s)]
    ranks = transport.all_gather([*mine, told["seen_at_wait"]], "bench flights")
    return [(took, worked, flown, seen, unseen) for took, worked, flown, seen, unseen in ranks]


def _median(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return median(known) if known else None
