"""Laws a prediction must keep, and figures that others have published."""

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.comm import legs
from crossdock.errors import ConfigError
from crossdock.simulate import (
    PRESETS,
    SHAPES,
    Choice,
    Cluster,
    Drawn,
    LayerShape,
    Link,
    Prediction,
    Processor,
    Schedule,
    Slots,
    Traffic,
    compare,
    count_chunks,
    explain,
    predict,
)
from crossdock.simulate.cost import COMPUTE, INNER, OUTER, Costs
from crossdock.simulate.schedule import CUTS, program
from crossdock.simulate.timeline import Job, run

SHAPE = LayerShape(1024, 256, 32, 4, shared=256)
GPUS = PRESETS["h100-400g"]
AMID = Schedule("node", amid=True)
SCHEDULES = [Schedule(hierarchy, wire, chunks) for hierarchy, wire, chunks in product(
    ("flat", "node", "ring"), ("bf16", "fp8"), (1, 2, 4))]  # fmt: skip


def parts(ranks: int = 32, tokens: int = 256, skew: float = 0.5, shape: LayerShape = SHAPE) -> dict[int, list[Traffic]]:
    blocks = Drawn.skewed(shape, skew).blocks(ranks, tokens)
    return count_chunks(blocks, Slots.contiguous(shape.experts, ranks), min(8, ranks), tokens, (1, 2, 4))


PARTS = parts()


def of(schedule: Schedule, cluster: Cluster = GPUS) -> Prediction:
    return predict(PARTS[schedule.chunks], SHAPE, cluster, schedule)


def jobs() -> st.SearchStrategy[list[Job]]:
    """Jobs that wait for earlier ones only."""

    @st.composite
    def draw(get: Any) -> list[Job]:
        found = []
        for number in range(get(st.integers(1, 8))):
            needs = get(st.dictionaries(st.sampled_from(["a", "b"]), st.floats(0.0, 5.0), max_size=2))
            after = get(st.sets(st.integers(0, number - 1), max_size=2)) if number else ()
            found.append(Job(f"j{number}", get(st.sampled_from("xyz")), needs, get(st.sampled_from([0.0, 1.0])),
                             tuple(after)))  # fmt: skip
        return found

    return draw()


@settings(max_examples=150, deadline=None)
@given(jobs())
def test_a_timeline_keeps_its_order_and_its_bounds(given_jobs: list[Job]) -> None:
    line = run(given_jobs)
    near = 1e-6
    for job, span in zip(given_jobs, line.spans, strict=True):
        assert span.end - span.begin >= job.alone - near  # sharing makes nothing faster
        assert all(line.spans[number].end <= span.begin + near for number in job.after)
    for lane in "xyz":
        own = [span for span in line.spans if span.lane == lane]
        assert all(first.end <= second.begin + near for first, second in pairwise(own))
    for name in "ab":
        assert line.total >= sum(job.needs.get(name, 0.0) for job in given_jobs) - near
    assert line.total <= sum(job.delay + sum(job.needs.values()) for job in given_jobs) + near


def test_jobs_share_what_both_need_and_nothing_else() -> None:
    """Two seconds of a core each, together: four. The link's three seconds pass beside them."""
    line = run([Job("a", "x", {"core": 2.0}), Job("b", "y", {"core": 2.0, "link": 3.0}), Job("c", "z", {}, 1.0)])
    assert [span.end for span in line.spans] == pytest.approx([4.0, 4.0, 1.0])
    line = run([Job("a", "x", {"core": 1.0}), Job("b", "y", {"core": 2.0, "link": 3.0})])
    assert [span.end for span in line.spans] == pytest.approx([2.0, 3.0])
    assert line.covered(frozenset("y"), frozenset("x")) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="in a circle"):
        run([Job("a", "x", {}, after=(1,)), Job("b", "y", {}, after=(0,))])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_without_overlap_the_time_is_the_sum_of_the_stages(schedule: Schedule) -> None:
    schedule = replace(schedule, overlap=False)
    written = program(PARTS[schedule.chunks], SHAPE, GPUS, schedule)
    found = of(schedule)
    assert found.total_s == pytest.approx(sum(job.alone for job in written.jobs), rel=1e-6)
    assert found.total_s == pytest.approx(sum(found.phase_s.values()), rel=1e-6)
    assert found.hidden == pytest.approx(0.0, abs=1e-9)
    assert sum(found.critical.values()) == pytest.approx(found.total_s, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_overlap_never_loses_and_never_beats_the_bound(schedule: Schedule) -> None:
    found, in_turn = of(schedule), of(replace(schedule, overlap=False))
    assert max(found.needs_s.values()) <= found.total_s * (1 + 1e-9)
    assert found.total_s <= in_turn.total_s * (1 + 1e-9)
    assert sum(found.critical.values()) == pytest.approx(found.total_s, rel=1e-6)
    assert found.hidden is not None and 0.0 <= found.hidden <= 1.0


def endless(cluster: Cluster) -> Cluster:
    """Links without limits or latencies, and a processor that only multiplies."""
    free = Link(1e30, 0.0)
    names = ("plan", "gather", "reduce", "encode", "decode", "local", "wire")
    return replace(
        cluster, intra=free, inter=free, processor=replace(cluster.processor, call_s=0.0, **dict.fromkeys(names, 1e30))
    )


@pytest.mark.parametrize("hierarchy", ["flat", "node", "ring"])
def test_with_endless_links_only_products_are_left(hierarchy: str) -> None:
    found, traffic = of(Schedule(hierarchy), endless(GPUS)), PARTS[1][0]
    costs = Costs(GPUS, SHAPE)
    products = costs.products(traffic, traffic.rows_W).needs["processor"] + costs.shared(traffic).needs["processor"]
    assert found.total_s == pytest.approx(products, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_faster_link_never_takes_longer(schedule: Schedule) -> None:
    times = [of(schedule, GPUS.changed({"inter.bytes_per_s": rate})).total_s for rate in (1e9, 5e9, 2e10, 1e11)]
    assert times == sorted(times, reverse=True) and times[0] > 1.5 * times[-1]
    times = [of(schedule, GPUS.changed({"intra.bytes_per_s": rate})).total_s for rate in (1e9, 1e10, 1e11)]
    assert times == sorted(times, reverse=True)
    assert of(schedule, GPUS.changed({"inter.latency_s": 1e-3})).total_s > of(schedule).total_s


def test_bytes_on_links_are_rows_times_their_width() -> None:
    flat, node = of(Schedule("flat")), of(Schedule("node", "fp8"))
    traffic = PARTS[1][0]
    here_WW = traffic.node_of_W[:, None] == traffic.node_of_W[None, :]
    leaving = int(np.where(here_WW, 0, traffic.flat_WW).sum())
    assert flat.bytes["inter"].total == leaving * 2 * 2048  # 1024 values of bfloat16, there and back
    crossing = int(traffic.rail_WW.sum())
    fp8_row, meta = 1024 + 32, SHAPE.top_k * (4 + 4)  # eight scales; a slot's id and a weight for each expert
    assert node.bytes["inter"].total == crossing * (fp8_row + meta + 2048)
    assert flat.bytes["inter"].mean == pytest.approx(leaving * 2 * 2048 / 32)
    assert flat.bytes["inter"].max >= flat.bytes["inter"].mean


def test_a_ring_of_two_nodes_is_the_exchange_over_rails() -> None:
    two = parts(16)[1]
    ring, node = (predict(two, SHAPE, GPUS, Schedule(name)) for name in ("ring", "node"))
    assert ring.bytes["inter"].total == node.bytes["inter"].total
    assert ring.total_s == pytest.approx(node.total_s, rel=0.02)


def test_a_shared_way_out_is_as_slow_as_its_ranks_together() -> None:
    shared = GPUS.changed({"inter.shared": True})
    one, node = (of(Schedule("flat"), cluster) for cluster in (GPUS, shared))
    assert node.bytes["inter"].mean == pytest.approx(8 * one.bytes["inter"].mean)
    assert node.needs_s["inter"] > 2 * one.needs_s["inter"]


def test_ranks_on_one_processor_wait_for_its_cores_and_a_rank_for_its_own() -> None:
    pool = Processor(4, 2, *[1.0] * 10, 0.0)
    costs = Costs(Cluster("pool", 2, Link(1.0, 0.0), Link(1.0, 0.0), pool), SHAPE)
    assert costs.work("even", "p", np.array([1.0, 1.0, 1.0, 1.0])).needs == {"processor": 2.0}
    assert costs.work("one", "p", np.array([4.0, 1.0, 0.0, 0.0])).needs == {"processor": 4.0}
    assert costs.work("two pools", "p", np.array([1.0, 1.0, 1.0, 1.0, 3.0])).needs == {"processor": 3.0}


def test_jobs_follow_the_layers_order() -> None:
    """Four chunks over rails: all first legs leave at once, and each chunk's experts follow the last one's."""
    written = program(PARTS[4], SHAPE, GPUS, Schedule("node", chunks=4))
    outer = [(job.name, job.chunk) for job in written.jobs if job.lane == OUTER and job.phase != "plan"]
    assert [chunk for name, chunk in outer if name == "dispatch between nodes"] == [0, 1, 2, 3]
    assert outer.index(("dispatch between nodes", 3)) < outer.index(("combine between nodes", 0))
    assert [job.chunk for job in written.jobs if job.name == "experts"] == [0, 0, 1, 2, 3]  # own rows, then far ones
    flat = [(job.name, job.chunk) for job in program(PARTS[4], SHAPE, GPUS, Schedule("flat", chunks=4)).jobs]
    assert flat.index(("dispatch", 1)) < flat.index(("experts", 0)) < flat.index(("dispatch", 2))
    assert {job.lane for job in written.jobs} == {COMPUTE, OUTER, INNER}
    assert all(number < at for at, job in enumerate(written.jobs) for number in job.after)


def test_rows_from_other_nodes_amid_the_nodes_own() -> None:
    """In the order of `comm.legs`, whose cuts are the same."""
    assert legs.CUTS[5] == CUTS
    own, far = "arrange own", "arrange what came over"
    leaving = ["gather for other nodes", "dispatch between nodes", "gather for the node", "dispatch inside nodes"]
    passed = ["gather what came over", "dispatch of what came over"]
    back = ["restore other nodes'", "combine other nodes' inside nodes"]
    home = ["sum other nodes'", "combine between nodes"]
    last = ["restore own", "combine own inside nodes", "sum"]
    unshared = replace(SHAPE, shared=0)
    found = [job.name for job in program(PARTS[1], unshared, GPUS, AMID).jobs if job.phase != "plan"]
    expected = [*leaving, own, "experts", *passed, "experts", far, "experts", *back, "experts", *home, "experts", *last]
    assert found == expected
    whole, amid = (predict(PARTS[1], unshared, GPUS, each) for each in (Schedule("node"), AMID))
    assert amid.bytes == whole.bytes and amid.hidden > whole.hidden
    alone = [program(PARTS[1], unshared, GPUS, each, experts=False) for each in (Schedule("node"), AMID)]
    assert alone[0].jobs == alone[1].jobs, "without products there is nothing to be amid"


@pytest.mark.parametrize("options", [{"hierarchy": "flat"}, {"hierarchy": "ring"}, {"hierarchy": "node", "chunks": 2}])
def test_amid_what(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="amid others in one chunk of hierarchy 'node'"):
        Schedule(**options, amid=True)


MANY = parts(16, 16384)  # on two nodes, and so many that each token travels to a rank once


def plan_jobs(schedule: Schedule) -> list[tuple[str, int]]:
    written = program(MANY[schedule.chunks], SHAPE, GPUS, schedule)
    jobs = [job for job in written.jobs if job.phase == "plan"]
    assert written.jobs[: len(jobs)] == tuple(jobs), "rows leave behind all plans"
    return [(job.name, job.chunk) for job in jobs]


def test_plans_are_made_in_the_dispatchers_order() -> None:
    """One gather for all chunks, one exchange of slots while the node's own are put in order, and one of indices."""
    every = range(4)
    assert plan_jobs(Schedule("node", chunks=4)) == [
        *[("plan", chunk) for chunk in every],
        ("counts", 0),
        *[("plan over nodes", chunk) for chunk in every],
        ("slots", 0),
        *[("plan of the node's own", chunk) for chunk in every],
        *[("plan of what comes over", chunk) for chunk in every],
        ("index", 0),
    ]
    flat = [*[("plan", chunk) for chunk in every], ("counts", 0), ("index", 0)]
    assert plan_jobs(Schedule("flat", chunks=4)) == flat


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("hierarchy", ["flat", "node"])
def test_chunks_share_the_latency_of_counts(hierarchy: str, chunks: int) -> None:
    """Links between nodes that cost a second each time: one for all counts, and one for all other integers."""
    slow = endless(GPUS)
    slow = replace(slow, inter=replace(slow.inter, latency_s=1.0), processor=replace(slow.processor, host=False))
    written = program(MANY[chunks], SHAPE, slow, Schedule(hierarchy, chunks=chunks))
    ends = [span.end for span in run(written.jobs).spans if span.phase == "plan"]
    assert max(ends) == pytest.approx(2.0, rel=1e-6)


def test_one_node_plans_without_the_links_of_others() -> None:
    alone = parts(8)[1]
    times = [predict(alone, SHAPE, GPUS.changed({"inter.latency_s": s}), Schedule("flat")).total_s for s in (0.0, 1.0)]
    assert times[0] == times[1]


@pytest.mark.parametrize(("nodes", "published"), [(2, (90, 81)), (4, (61, 61))])
def test_published_bandwidth_between_nodes(nodes: int, published: tuple[int, int]) -> None:
    """DeepEP V2 on CX7: 8192 tokens of 7168, top 8, FP8 there, BF16 back; GB/s with a node's own share included."""
    shape = replace(SHAPES["deepseek-v3"], num_groups=1, top_groups=1)
    traffic = parts(8 * nodes, 8192, 0.0, shape)[1]
    written = program(traffic, shape, GPUS, Schedule("node", "fp8"))
    rows = traffic[0].outer_WN.sum(1).mean()
    for phase, row, expected in zip(("dispatch", "combine"), (shape.fp8_row, shape.native_row), published, strict=True):
        took = next(job.alone for job in written.jobs if job.name == f"{phase} between nodes")
        assert rows * row / took / 1e9 == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("ranks", "dispatch_us", "combine_us"), [(8, 77, 114), (64, 173, 314), (128, 192, 369)])
def test_published_latency_of_few_tokens(ranks: int, dispatch_us: int, combine_us: int) -> None:
    """DeepEP V1, low latency on H800: 128 tokens, a row for each (token, expert)."""
    shape = replace(SHAPES["deepseek-v3"], num_groups=1, top_groups=1)
    blocks = Drawn.skewed(shape).blocks(ranks, 128)
    [traffic] = count_chunks(blocks, Slots.contiguous(256, ranks), 8, 128, (1,))[1]
    costs = Costs(PRESETS["h800-400g"].changed({"processor.call_s": 0.0}), shape)
    for row, expected in ((shape.fp8_row, dispatch_us), (shape.native_row, combine_us)):
        stage = costs.exchange("dispatch", OUTER, "dispatch", "arrive", traffic.flat_WW * row)
        assert (stage.delay + max(stage.needs.values())) * 1e6 == pytest.approx(expected, rel=0.15)


def test_the_best_comes_first_and_says_why() -> None:
    choice = Choice(placements=("contiguous", "balanced"), hierarchies=("plain", "flat", "node"), chunks=(1, 2))
    for found in compare(SHAPE, GPUS, Drawn.skewed(SHAPE, 1.0), 128, [8, 16], choice):
        times = [one.total_s for one in found]
        assert times == sorted(times)
        kinds = {(one.schedule.hierarchy, one.schedule.placement) for one in found}
        nodes = found[0].nodes
        assert ("node", "balanced") in kinds if nodes > 1 else ("node", "balanced") not in kinds
        assert sum(one.schedule.hierarchy == "plain" for one in found) == 2  # one a placement
        lines = explain(found)
        assert str(found[0].schedule) in lines[0] and "It is bound by" in lines[0] and "longest chain" in lines[1]
        assert sum("times as long" in line for line in lines) >= 3


def test_balanced_placement_relieves_the_busiest_rank() -> None:
    shape = LayerShape(1024, 256, 64, 4)
    routing, choice = Drawn.skewed(shape, 1.2), Choice(("flat",), ("bf16",), (1,), ("contiguous", "balanced"))
    [found] = compare(shape, GPUS, routing, 512, [16], choice)
    by_placement = {one.schedule.placement: one for one in found}
    assert by_placement["balanced"].phase_s["experts"] < 0.8 * by_placement["contiguous"].phase_s["experts"]
    assert found[0].schedule.placement == "balanced"
