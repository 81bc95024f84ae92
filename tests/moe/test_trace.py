"""The timeline: stretches of time on synthetic numbers, what is told of a layer, and the file."""

import doctest
import json
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock import EPGroup, LocalWorld, make_transport
from crossdock.comm import LocalTransport, Pending, Transport
from crossdock.comm.transport import Done
from crossdock.errors import ConfigError
from crossdock.moe import ExchangeConfig, intervals, pipeline
from crossdock.moe.intervals import flown_and_seen, hidden_fraction, length, shared, union, without
from crossdock.moe.timeline import chrome_trace
from crossdock.moe.trace import NO_TRACE, DeviceClock, Recorder, Watched, recorder_of, traced, write_trace
from crossdock.parallel import Topology
from tests.launch import Ranks
from tests.moe.links import Slow, noise
from tests.moe.test_pipeline import build, forward


@pytest.mark.parametrize("module", [intervals, pipeline])
def test_examples_are_right(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_sets_of_stretches_agree_with_counting() -> None:
    """Against sets of whole seconds, on random stretches."""
    random = Random(0)

    def draw() -> list[tuple[float, float]]:
        begins = [random.randrange(30) for _ in range(random.randrange(6))]
        return [(begin, begin + random.randrange(8)) for begin in begins]

    def seconds(stretches: list[tuple[float, float]]) -> set[int]:
        return {t for begin, end in stretches for t in range(int(begin), int(end))}

    for _ in range(300):
        some, others = draw(), draw()
        assert seconds(union(some)) == seconds(some)
        assert length(some) == len(seconds(some))
        assert seconds(shared(some, others)) == seconds(some) & seconds(others)
        assert seconds(without(some, others)) == seconds(some) - seconds(others)
        assert all(a[1] < b[0] for a, b in pairwise(union(some)))


@pytest.mark.parametrize(
    ("flights", "waits", "expected"),
    [
        ([], [(0, 5)], None),
        ([(0, 10)], [], 1.0),
        ([(0, 10)], [(0, 10)], 0.0),
        ([(0, 10)], [(0, 2), (9, 12)], 0.7),
        ([(0, 4), (2, 6), (8, 12)], [(6, 8)], 1.0),
        ([(0, 4), (2, 6), (8, 12)], [(5, 9)], 0.8),
    ],
)
def test_hidden_is_what_is_in_flight_and_not_waited_for(
    flights: list[tuple[float, float]], waits: list[tuple[float, float]], expected: float | None
) -> None:
    found = hidden_fraction([flown_and_seen(flights, waits)])
    assert found == (expected if expected is None else pytest.approx(expected))


def test_nothing_is_recorded_without_tracing(tmp_path: Path) -> None:
    transport = LocalTransport()
    with traced(None, transport) as same:
        assert same is transport
    assert recorder_of(transport) is NO_TRACE
    assert build(transport, ExchangeConfig()).recorder is NO_TRACE
    with NO_TRACE.span("a"), NO_TRACE.wait("b"):
        pass


def trace_forward(transport: Transport, path: Path) -> tuple[Tensor, Tensor]:
    """A layer's output with and without tracing."""
    exchange = ExchangeConfig(chunks=3)
    with traced(path, transport) as watched:
        found = forward(watched, [12, 11], exchange)
    return found, forward(transport, [12, 11], exchange)


def trace_in_group(group: EPGroup, path: Path) -> tuple[Tensor, Tensor]:
    return trace_forward(make_transport(group), path)


def check_file(path: Path, kinds: set[str]) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(path.read_text())
    events = trace["traceEvents"]
    assert {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"} == {
        (0, "rank 0"),
        (1, "rank 1"),
    }
    for rank in (0, 1):
        own = [e for e in events if e["pid"] == rank]
        begun = {e["id"]: e for e in own if e["ph"] == "b"}
        ended = {e["id"]: e for e in own if e["ph"] == "e"}
        assert begun.keys() == ended.keys()
        assert all(ended[key]["ts"] >= event["ts"] >= 0 and event["args"]["bytes"] >= 0 for key, event in begun.items())
        assert kinds <= {event["cat"] for event in begun.values()}
        rows = {tid: sorted((e["ts"], e["dur"]) for e in own if e["ph"] == "X" and e["tid"] == tid) for tid in (0, 1)}
        assert {e["name"] for e in own if e["ph"] == "X" and e["tid"] == 0} >= {"route", "experts", "shared experts"}
        assert rows[1], "no rank is so fast that it waits for nothing"
        both = sorted(rows[0] + rows[1])
        for (begin, took), (then, _) in pairwise(both):
            assert begin + took <= then + 0.002, "a rank computes or waits, never both"
    return trace


def test_a_file_tells_of_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for found, expected in LocalWorld(2).run(lambda t: trace_forward(t, path)):
        assert torch.equal(found, expected)
    trace = check_file(path, {"dispatch", "combine"})
    told = trace["otherData"]["hidden"]
    assert 0.0 <= told["fraction"] <= 1.0 and len(told["by_rank"]) == 2
    assert told["flights"] >= 2 * 2 * 2 * 3, "two ranks, two calls, there and back, three chunks"
    assert told["arrivals_seen_at_the_wait_only"] == told["flights"] and not told["is_cut_short"]


def test_a_file_of_real_ranks(ranks_of_two: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for found, expected in ranks_of_two.run(trace_in_group, path):
        assert torch.equal(found, expected)
    told = check_file(path, {"dispatch", "combine"})["otherData"]["hidden"]
    assert told["flights"] and not told["arrivals_seen_at_the_wait_only"], "gloo tells of arrivals"


def test_both_legs_of_an_exchange_over_nodes_are_seen() -> None:
    def phases(transport: Transport) -> set[str]:
        recorder = Recorder()
        forward(Watched(transport, recorder), [6, 6, 6, 5], ExchangeConfig(hierarchy="node", chunks=2))
        assert recorder.told()["flights"]
        return {flight.phase.split(" of exchange")[0] for flight in recorder.flights}

    for found in LocalWorld(4, topology=Topology((0, 0, 1, 1))).run(phases):
        assert {
            f"{way} {leg}" for way in ("dispatch", "combine") for leg in ("between nodes", "inside the node")
        } <= found


def test_arrivals_are_seen_when_they_happen() -> None:
    """Of rows that take a while, long before anyone waits for them."""

    def flight_s(transport: Transport) -> tuple[float, float]:
        recorder = Recorder()
        watched = Watched(Slow(transport, 1e-3), recorder)
        pending = watched.all_to_all_rows(noise(4, 25, seed=1), [2, 2], [2, 2], "dispatch of exchange 1")  # 0.2 s
        time.sleep(0.8)
        pending.wait()
        (flight,) = recorder.flights
        assert flight.seen_arriving and recorder.hidden() == pytest.approx(1.0, abs=0.01)
        return (flight.end - flight.begin) / 1e9, recorder.told()["seen_at_wait"]

    for took_s, seen_at_wait in LocalWorld(2).run(flight_s):
        assert 0.19 < took_s < 0.6
        assert seen_at_wait == 0


def test_waits_for_counts_are_in_sight() -> None:
    recorder = Recorder()
    watched = Watched(LocalTransport(), recorder)
    assert watched.all_gather([3], "plan") == [[3]]
    assert [phase for phase, *_ in recorder.waits] == ["plan"]
    assert recorder.hidden() is None, "nothing flew"


def test_warm_up_is_forgotten() -> None:
    recorder = Recorder()
    with recorder.span("warm-up"):
        pass
    recorder.clear()
    assert recorder.told()["spans"] == []


def test_nothing_is_kept_while_paused() -> None:
    def run(transport: Transport) -> tuple[dict[str, Any], dict[str, Any]]:
        recorder = Recorder(paused=True)
        layer, x_TD = build(Watched(transport, recorder), ExchangeConfig()), noise(5, 36, seed=2)
        layer(x_TD)
        paused, recorder.paused = recorder.told(), False
        layer(x_TD)
        return paused, recorder.told()

    for paused, told in LocalWorld(2).run(run):
        assert not any(paused.values()) and told["spans"] and told["waits"] and told["flights"]


def test_a_long_trace_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdock.moe.trace.MOST", 3)
    recorder = Recorder()
    for _ in range(5):
        with recorder.span("more"):
            pass
    assert len(recorder.spans) == 3
    assert chrome_trace([recorder.told()])["otherData"]["hidden"]["is_cut_short"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"cannot be written to .*absent"),
        traced(tmp_path / "absent" / "trace.json", LocalTransport()),
    ):
        pass


class OnDevice(LocalTransport):
    """Takes rows of its device only, as NCCL does. Nothing is on the meta device, so `rows` are what arrives."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        assert rows_SD.device.type == "meta" and rows_SD.shape == self.rows.shape
        return Done(self.rows)


def test_timelines_travel_from_the_memory_of_rows(tmp_path: Path) -> None:
    recorder = Recorder()
    with recorder.span("experts"):
        pass
    told = torch.frombuffer(bytearray(json.dumps(recorder.told()).encode()), dtype=torch.uint8)[:, None]
    write_trace(tmp_path / "trace.json", recorder, OnDevice(told), torch.device("meta"))
    assert "experts" in (tmp_path / "trace.json").read_text()


def test_spans_end_where_waits_begin() -> None:
    told = {"spans": [("sums", 1.0, 5.0)], "waits": [("combine", 2.0, 3.0)], "flights": [("combine", 0.0, 3.0, 8)]}
    told |= {"in_flight": [(0.0, 3.0)], "waiting": [(2.0, 3.0)], "seen_at_wait": 0, "is_full": False}  # type: ignore[dict-item]
    events = chrome_trace([told])["traceEvents"]
    pieces = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert pieces == [("sums", 1e6, 1e6), ("sums", 3e6, 2e6), ("combine", 2e6, 1e6)]


class Events:
    """torch.cuda's events on a clock that ticks one millisecond at each record."""

    def __init__(self) -> None:
        self.now_ms = 0.0

    def Event(self, enable_timing: bool) -> Any:
        return _Event(self)


class _Event:
    def __init__(self, clock: Events) -> None:
        self.clock = clock
        self.at_ms, self.is_done = -1.0, False

    def record(self) -> None:
        self.clock.now_ms += 1.0
        self.at_ms = self.clock.now_ms

    def synchronize(self) -> None:
        self.is_done = True

    def elapsed_time(self, other: "_Event") -> float:
        assert self.is_done and other.is_done
        return other.at_ms - self.at_ms


def test_times_of_a_device_are_those_of_its_events() -> None:
    recorder = Recorder(DeviceClock(Events()))
    with recorder.span("experts"):
        pass
    watched = Watched(LocalTransport(), recorder)
    watched.all_gather([1], "plan")
    ((name, begin, end),) = recorder.told()["spans"]
    assert name == "experts" and end - begin == pytest.approx(1e-3, abs=1e-6)
    assert not recorder.waits, "the host's waits are not the device's"
