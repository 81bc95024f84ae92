"""`bench exchange` at toy sizes: what it counts, what it compares, and that wrong results are not timed."""

import doctest
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.cli.bench import expert_size
from crossdock.cli.bench.cluster import Link, Shape, emulated_cluster, run_on_cluster
from crossdock.cli.bench.counted import Counted, crossings
from crossdock.cli.bench.exchange import ROUTINGS, _fitting, _row
from crossdock.cli.bench.exchange_case import Case, Contenders, Found, Ours, choose
from crossdock.cli.bench.flights import Flights
from crossdock.cli.bench.links import Links
from crossdock.cli.bench.plain_exchange import plain_combine, plain_dispatch
from crossdock.cli.runtime import Runtime
from crossdock.comm import LocalWorld, Transport, make_transport
from crossdock.errors import ConfigError
from crossdock.moe.pace import CANDIDATES
from crossdock.parallel import EPGroup, Topology
from crossdock.routing import Routing
from crossdock.simulate import Cluster, Processor
from crossdock.simulate import Link as Wire
from crossdock.simulate.check import check
from tests.cli.conftest import Run
from tests.launch import RankError, Ranks

CPU = torch.device("cpu")
PROMISED = {"hidden", "tokens_per_rank", "routing", "speedup_fp8", "speedup_bf16", "exchange_speedup_fp8",
            "exchange_speedup_bf16", "internode_bytes", "internode_bytes_minimum", "hidden_fraction"}  # fmt: skip


def test_only_what_leaves_the_node_is_counted() -> None:
    """Rank 1 of two nodes of two sends 1, 2, 3 and 4 rows of 6 bytes to ranks 0 to 3: 7 of them leave node 0.

    Then each rank sends 5 bytes to the first rank of its pair across the nodes, which for ranks 2 and 3 is another.
    """

    def on(transport: Transport) -> tuple[int, int]:
        counted = Counted(transport)
        sends = [1, 2, 3, 4] if counted.rank == 1 else [0] * 4
        receives = [0, counted.rank + 1, 0, 0]
        rows_SD = torch.ones(sum(sends), 3, dtype=torch.bfloat16)
        counted.all_to_all_rows(rows_SD, sends, receives, "dispatch of exchange 1").wait()
        counted.all_gather([1, 2, 3], "plan")  # 24 bytes to each of two
        counted.split([[0, 1], [2, 3]]).all_gather([1], "plan")  # inside a node
        pair = counted.split([[0, 2], [1, 3]])
        five = torch.ones(5, 1, dtype=torch.uint8)
        pair.all_to_all_rows(five, [5, 0], [5, 5] if pair.rank == 0 else [0, 0], "combine of exchange 1").wait()
        pair.all_to_all_rows(five, [5, 0], [5, 5] if pair.rank == 0 else [0, 0], "plan").wait()
        return counted.crossed.rows, counted.crossed.metadata

    found = LocalWorld(4, topology=Topology((0, 0, 1, 1))).run(on)
    assert found == [(0, 48), (42, 48), (5, 53), (5, 53)]


def test_crossings_of_a_plan() -> None:
    """Rank 2 of two nodes of two, one slot a rank: slots 0 and 1 are on the other node, -1 is nowhere."""

    def on(transport: Transport) -> tuple[int, int]:
        return crossings(torch.tensor([[0, 1, 2], [2, 3, -1], [1, 3, 2]]), transport, 1)

    assert LocalWorld(4, topology=Topology((0, 0, 1, 1))).run(on)[2] == (3, 2)


def plain_result(group: EPGroup) -> tuple[float, list[int]]:
    """The largest error of the plain form where slot s multiplies by s + 1, and this rank's ends."""
    torch.manual_seed(group.rank)
    tokens, slots_per_rank = 5 + group.rank, 3
    x_TD, weights_TK = torch.randn(tokens, 4), torch.rand(tokens, 2)
    ids_TK = torch.rand(tokens, slots_per_rank * group.world_size).topk(2).indices
    rows_RD, trip = plain_dispatch(x_TD, ids_TK, slots_per_rank, group.process_group)
    slot_R = torch.searchsorted(trip.ends_L, torch.arange(len(rows_RD)), right=True) + group.rank * slots_per_rank
    y_TD = plain_combine(rows_RD * (slot_R + 1)[:, None], weights_TK, trip)
    expected_TD = x_TD * (weights_TK * (ids_TK + 1)).sum(1, keepdim=True)
    return float((y_TD - expected_TD).abs().max()), trip.ends_L.tolist()


def test_the_plain_form_is_right(ranks_of_two: Ranks) -> None:
    (error, ends), (other_error, other_ends) = ranks_of_two.run(plain_result)
    assert max(error, other_error) < 1e-5 and ends[-1] + other_ends[-1] == 2 * (5 + 6)


def spoil_exchange(ours: Ours) -> None:
    ours.exchange = lambda x_TD, routing: x_TD * 1.2  # type: ignore[method-assign]


def spoil_layer(ours: Ours) -> None:
    """Token 2 gets one expert that it has not chosen."""
    whole = ours.whole

    def spoiled(x_TD: Tensor, routing: Routing) -> Tensor:
        ids_TK = routing.expert_ids_TK.clone()
        ids_TK[2, 0] = next(expert for expert in range(64) if expert not in ids_TK[2])
        return whole(x_TD, Routing(ids_TK, routing.weights_TK, ids_TK))

    ours.whole = spoiled  # type: ignore[method-assign]


def measured(group: EPGroup, wire: str = "", spoil: Callable[[Ours], None] | None = None) -> dict[str, Any]:
    with torch.inference_mode():
        contenders = Contenders(group, make_transport(group), 128, 32)
        if spoil is not None:
            spoil(contenders.ours[wire])
        case = Case(128, 4, "skewed")
        return _row(case, contenders.measure(case, 0.1, 2))


def test_a_case_on_one_node(ranks_of_two: Ranks) -> None:
    for row in ranks_of_two.run(measured):
        assert row.keys() >= PROMISED and row["us"] > 0 and row["rounds"] == 2
        assert row["chunks"].keys() == {"bf16 layer", "fp8 layer"} and set(row["chunks"].values()) <= {*CANDIDATES}
        assert row["arrivals_seen_at_the_wait_only"] == row["arrivals_seen_at_the_wait_only_fp8"] == 0, "gloo tells"
        times = row["times_us"]
        for wire in ("bf16", "fp8"):
            assert row[f"exchange_speedup_{wire}"] == pytest.approx(times["plain"] / times[wire])
            assert row[f"speedup_{wire}"] == pytest.approx(times["plain layer"] / times[f"{wire} layer"])
        assert row["rows_speedup"] > 0
        assert row["internode_bytes"] == row["internode_bytes_minimum"] == 0
        assert 0 < row["busy_cores"] < 3 and 0 < row["busy_cores_fp8"] < 3, "two ranks, and what moves their rows"
        for name in ("hidden_fraction", "hidden_fraction_of_busiest_fp8", "hidden_fraction_of_cores"):
            assert 0 <= row[name] <= 1, name


def test_wrong_results_are_not_timed(ranks_of_two: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1: fp8: tokens came back changed by 0\.(2|19)"):
        ranks_of_two.run(measured, "fp8", spoil_exchange)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_a_layer_with_a_wrong_expert_is_not_timed(ranks_of_two: Ranks, wire: str) -> None:
    with pytest.raises(RankError, match=rf"rank 1: {wire} layer: token 2 differs from the plain layer's by 0\.[2-7]"):
        ranks_of_two.run(measured, wire, spoil_layer)


def sized(group: EPGroup, links: Links | None) -> tuple[int, str]:
    return expert_size.measured_size(make_transport(group), links)


def test_experts_are_as_large_as_products_and_links_make_them(ranks_of_two: Ranks) -> None:
    """Of links so slow or so fast that no core's products are near the border."""
    assert doctest.testmod(expert_size) == (0, 1)
    slow, fast = ({"between": {"gbytes_per_s": rate, "us": 1.0}} for rate in (1e-6, 1e6))
    assert {size for size, _ in ranks_of_two.run(sized, slow)} == {2048}
    ((size, why), (other, _)) = ranks_of_two.run(sized, fast | {"inside": {"gbytes_per_s": 1e-6, "us": 1.0}})
    assert size == other == 64 and why.endswith(
        "e9 operations/s a rank behind 500000000 MB/s, and this is the least"
    ), "two share a link"
    assert {size for size, _ in ranks_of_two.run(sized, {"inside": slow["between"]})} == {2048}
    assert ranks_of_two.run(sized, None) == [(2048, "as DeepSeek-V3's")] * 2


def chunks_of(group: EPGroup) -> tuple[dict[str, int], list[int]]:
    """What is told of layers that were to take 2 chunks, then 6 and 6; and of all calls."""
    with torch.inference_mode():
        contenders = Contenders(group, make_transport(group), 128, 32)
        chosen = iter([1, 2, 6, 6, 2, 3, 2, 3])
        pace = contenders.ours["bf16"].layer.pipeline.pace
        assert pace is not None

        def choose_next(tokens: int, whole: bool) -> tuple[int, int]:
            pace.chosen = next(chosen)
            return pace.chosen, pace.portions

        pace.choose = choose_next  # type: ignore[method-assign]
        told = contenders.measure(Case(128, 16, "random"), 0.1, 2).chunks
        return told, [chunks for chunks, _ in contenders.ours["bf16"].chunks]


def test_chunks_are_those_of_the_rounds(ranks_of_two: Ranks) -> None:
    """Not those of the call that is checked, of the warm-up, or of the calls in which flights are seen."""
    for told, calls in ranks_of_two.run(chunks_of):
        assert calls == [1, 2, 6, 6, 2, 3, 2, 3] and told["bf16 layer"] == 6


def test_routing() -> None:
    for name in ROUTINGS:
        routing = choose(Case(8, 500, name), 0, CPU)
        counts_E = routing.expert_ids_TK.reshape(-1).bincount(minlength=64)
        assert routing.expert_ids_TK.sort(1).values.diff(dim=1).min() > 0  # distinct
        assert (int(counts_E[0]) > 300) == (name == "skewed") and int(counts_E.sum()) == 500 * 8
        assert torch.allclose(routing.weights_TK.sum(1), torch.ones(500))


def fitting(group: EPGroup, free: int) -> tuple[list[str], list[str]]:
    cases = [Case(128, 4, "random"), Case(128, 4096, "random")]
    kept, left_out = _fitting(Runtime(group, make_transport(group)), cases, group.world_size, 32, free)
    return list(map(str, kept)), list(left_out)


def test_cases_without_memory_for_them_are_left_out(ranks_of_two: Ranks) -> None:
    small, large = "D=128 T=4 random", "D=128 T=4096 random"
    assert ranks_of_two.run(fitting, 1 << 40) == [([small, large], [])] * 2
    assert ranks_of_two.run(fitting, 10_000_000) == [([small], [large])] * 2
    with pytest.raises(RankError, match=r"no case fits into memory: .*needs about 0\.2 GB, and 0\.0 GB are free"):
        ranks_of_two.run(fitting, 1000)


def test_the_speed_of_rows_alone_is_the_median_of_the_rounds_ratios() -> None:
    times = dict.fromkeys(("plain", "bf16", "fp8", "plain layer", "bf16 layer", "fp8 layer", "experts"), [1.0] * 3)
    times |= {"plain rows": [1.0, 4.0, 9.0], "rows": [2.0, 1.0, 3.0]}
    flights, sizes = Flights(None, None, None, 0, 1.0), dict.fromkeys(("plain", "bf16", "fp8"), 0)
    row = _row(Case(128, 4, "random"), Found(times, {"bf16": flights, "fp8": flights}, {}, {}, sizes, sizes, sizes))
    assert (row["rows_speedup"], row["speedup_fp8"], row["times_us"]["rows"]) == (3.0, 1.0, 2e6)


def test_ranks_without_torchs_all_to_all_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of a launcher, as ranks of mpiexec, has nothing to compare with."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    code, out, err = run("bench", "exchange")
    assert (code, out) == (1, "") and "found 1 of them on transport 'local'" in err and err.count("\n") == 1


def test_an_emulated_cluster_from_end_to_end(capfd: pytest.CaptureFixture[str]) -> None:
    """Ours sends what it must between nodes and no more; the plain form sends a row for each (token, k)."""
    words = ["bench", "exchange", "--emulate", "2x2", "--hidden", "128", "--tokens", "32", "--rounds", "1", "--json"]
    try:
        with emulated_cluster(Shape(1, 2), Link()):
            pass
    except ConfigError as error:
        pytest.skip(str(error))
    code = run_on_cluster([sys.executable, "-m", "crossdock", *words, "--expert-size", "32"], Shape(2, 2), Link())
    out, err = capfd.readouterr()
    result, (experts, *told) = json.loads(out), err.splitlines()
    assert code == 0 and result["world"] == "2x2" and len(told) == len(result["cases"]) == 2
    assert experts == "experts of 32: asked for"
    rates = Processor(4, 2, *[1e9] * 10, 0.0)
    predicted = check(result, Cluster("any", 2, Wire(1e9, 1e-4), Wire(1e8, 1e-3, shared=True), rates))
    assert len(predicted) == 2 * 6 and {one.same_rows for one in predicted} == {True}
    assert result["links"]["inside"]["gbytes_per_s"] > result["links"]["between"]["gbytes_per_s"]
    for case in result["cases"]:
        assert case.keys() >= PROMISED
        assert case["internode_bytes"] == case["internode_bytes_minimum"] > 0
        assert case["internode_bytes_fp8"] == case["internode_bytes_minimum_fp8"] < case["internode_bytes"]
        assert case["internode_bytes_plain"] > 2 * case["internode_bytes"]
