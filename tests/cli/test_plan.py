"""`crossdock plan`: what it prints, draws and writes, and options that cannot be."""

import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from crossdock.cli.bench.cluster import Link, Shape
from crossdock.cli.plan_calibrate import Size, calibrate
from crossdock.comm import LocalWorld
from crossdock.errors import ConfigError
from crossdock.parallel import Topology
from crossdock.simulate import PRESETS, Cluster
from tests.cli.conftest import Run

SMALL_SIZE = Size(hidden=64, tokens=16, expert=32, rounds=2, pings=2)
SMALL = ("--tokens", "32", "--ranks", "8,16", "--chunks", "1,2")
KEYS = {"ranks", "nodes", "hierarchy", "wire", "chunks", "overlap", "placement", "us", "phases_us", "hidden_fraction",
        "bound", "needs_us", "critical_path_us", "bytes"}  # fmt: skip


def test_json(run: Run) -> None:
    code, out, err = run("plan", "qwen3-30b", *SMALL, "--skew", "1", "--placement", "balanced", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["model"] == "qwen3-30b" and answer["cluster"] == json.loads(
        json.dumps(PRESETS["h100-400g"].to_json())
    )
    assert len(answer["cases"]) == 4 + 12 and all(set(case) >= KEYS for case in answer["cases"])
    by_name = {case["case"]: case for case in answer["cases"]}
    for ranks, schedule in answer["best"].items():
        rivals = [case["us"] for case in answer["cases"] if case["ranks"] == int(ranks)]
        assert by_name[f"{ranks} ranks, {schedule}"]["us"] == min(rivals)
    assert len(answer["why"]) == 2 and "It is bound by" in answer["why"][1][0]
    assert set(answer["cases"][0]["bytes"]) == {"self", "intra", "inter"}


def test_text_and_drawing(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    code, out, err = run("plan", *SMALL, "--plot", str(path))
    assert code == 0 and path.stat().st_size > 10_000 and f"drawn: {path}" in err
    assert "times as long" in out and "DeepEP V2" in out and "node fp8" in out


def test_values_and_files(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(PRESETS["h200-400g"].to_json()))
    changed = ("--set", "inter.bytes_per_s=1e9", "--set", "ranks_per_node=4", "--set", "inter.shared=true")
    code, out, _ = run(
        "plan", *SMALL, "--cluster", str(path), *changed, "--hierarchy", "flat", "--no-overlap", "--json"
    )
    answer = json.loads(out)
    assert code == 0 and answer["cluster"]["inter"] == {"bytes_per_s": 1e9, "latency_s": 32e-6, "shared": True}
    assert {case["nodes"] for case in answer["cases"]} == {2, 4}
    assert {case["overlap"] for case in answer["cases"]} == {False}


def test_a_trace_a_load_and_a_config(run: Run, tmp_path: Path) -> None:
    config = {"hidden_size": 256, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.save(tmp_path / "ids.npy", np.tile([[0, 1], [2, 3]], (8, 1)))
    code, out, _ = run("plan", str(tmp_path), *SMALL, "--trace", str(tmp_path / "ids.npy"), "--json")
    answer = json.loads(out)
    assert code == 0
    # Experts 0 to 3 stand on ranks 0 and 1 of 8 (2 experts a rank) and on ranks 0 to 3 of 16: all on the first node.
    flat = next(case for case in answer["cases"] if case["case"] == "16 ranks, flat bf16")
    assert flat["bytes"]["inter"]["total"] == 2 * 8 * 32 * 2 * 512
    (tmp_path / "load.json").write_text(json.dumps([1.0] * 2 + [0.0] * 14))
    code, out, _ = run("plan", str(tmp_path), *SMALL, "--trace", str(tmp_path / "load.json"), "--json")
    assert code == 0 and json.loads(out)["routing"].endswith("load.json")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["deepseek-v9"], 1, "deepseek-v3, kimi-k2, qwen3-235b, qwen3-30b or a folder with a config.json"),
        (["--cluster", "laptop"], 1, "--cluster must be one of h100-400g"),
        (["--set", "inter.bytes_per_s"], 1, "--set must be NAME=VALUE"),
        (["--set", "inter.colour=3"], 1, "no number 'inter.colour'"),
        (["--set", "inter.bytes_per_s=-1"], 1, "bytes_per_s must be above 0"),
        (["--set", "ranks_per_node=2.5"], 1, "ranks_per_node"),
        (["--ranks", "8,x"], 1, "--ranks must be positive integers"),
        (["--ranks", "12"], 1, "12 ranks do not fill nodes of 8"),
        (["--chunks", "0"], 1, "--chunks must be positive integers"),
        (["--hierarchy", "tree"], 1, "--hierarchy must be one of flat, node, ring, plain"),
        (["--wire", "fp4"], 1, "--wire must be one of bf16, fp8"),
        (["--placement", "odd"], 1, "--placement must be one of contiguous, balanced"),
        (["--spare", "2"], 1, "--spare is of balanced placements"),
        (["--tokens", "0"], 2, "'--tokens'"),
        (["--tokens", "1000000"], 1, "choices to count"),
        (["--skew", "nan"], 1, "skew must be in 0..10"),
        (["--set", "ranks_per_node=inf"], 1, "ranks_per_node must be an integer, found inf"),
        (["--set", "ranks_per_node=nan"], 1, "ranks_per_node must be an integer, found nan"),
        (["--trace", "absent.npy"], 1, "absent.npy cannot be read"),
        (["--trace", "absent.npy", "--skew", "0"], 1, "--skew is of routing that is drawn"),
        (["--check", "absent.json", "deepseek-v3"], 1, "the model says nothing to --check: leave it out"),
        (["--check", "absent.json", "--ranks", "8"], 1, "--ranks says nothing to --check"),
        (["--check", "absent.json", "--overlap"], 1, "--overlap says nothing to --check"),
        (["--calibrate", "rates.json", "--tokens", "8"], 1, "--tokens says nothing to --calibrate"),
        (["--calibrate", "rates.json", "--check", "absent.json"], 1, "--check says nothing to --calibrate"),
        (["--check", "absent.json"], 1, "absent.json cannot be read as JSON"),
        (["--emulate", "2x2"], 1, "--emulate is for --calibrate"),
        (["--calibrate", "absent/rates.json"], 1, "there is no folder"),
        pytest.param(
            ["--check", "absent.json", "--plot", "plan.png"],
            1,
            "--plot says nothing to --check",
            marks=pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed"),
        ),
        pytest.param(
            ["--plot", "absent/plan.png"],
            1,
            "there is no folder",
            marks=pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed"),
        ),
    ],
)
def test_bad_option(run: Run, options: list[str], code: int, message: str) -> None:
    got, out, err = run("plan", *options, "--json")
    assert (got, out, len(err.splitlines())) == (code, "", 1), err
    assert err.startswith("error: ") and message in err


def test_predicted_beside_measured(run: Run, tmp_path: Path) -> None:
    case = {"case": "D=256 T=16 random", "hidden": 256, "tokens_per_rank": 16, "routing": "random",
            "times_us": {"plain": 1000.0, "fp8 layer": 2000.0}, "internode_bytes": 5,
            "chunks": {"fp8 layer": 2}}  # fmt: skip
    result = {"world": "2x2", "expert_size": 64, "num_experts": 64, "top_k": 8, "cases": [case]}
    (tmp_path / "measured.json").write_text(json.dumps(result))
    pairs = PRESETS["h100-400g"].changed({"ranks_per_node": 2})
    (tmp_path / "pairs.json").write_text(json.dumps(pairs.to_json()))
    files = ("--check", str(tmp_path / "measured.json"), "--cluster", str(tmp_path / "pairs.json"))
    code, out, _ = run("plan", *files)
    assert code == 0 and "2 of these times are of other rows" in out and "of 2 times" in out
    code, out, _ = run("plan", *files, "--json")
    answer = json.loads(out)
    assert [row["form"] for row in answer["cases"]] == ["plain", "fp8 layer"]
    errors = sorted(abs(row["error"]) for row in answer["cases"])
    assert code == 0 and answer["median_error"] == pytest.approx(sum(errors) / 2)


@pytest.mark.parametrize("topology", [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1)], ids=str)
def test_rates_are_measured(topology: tuple[int, ...]) -> None:
    """What comes out is a cluster that predictions take: every rate is above zero, or `Cluster` would not have it."""
    world = LocalWorld(len(topology), topology=Topology(topology))
    found = world.run(lambda transport: calibrate(transport, True, SMALL_SIZE))[0]
    nodes = max(topology) + 1
    assert found.name == f"measured-{nodes}x{len(topology) // nodes}" and found.inter.shared == (nodes > 1)
    assert (found.processor.ranks, found.ranks_per_node) == (len(topology), len(topology) // nodes)
    assert Cluster.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_more_ranks_than_experts_have_no_rates() -> None:
    many = SimpleNamespace(world_size=65, topology=Topology((0,) * 65))
    with pytest.raises(ConfigError, match="divides 64 experts over the ranks: at most 64, found 65"):
        calibrate(many, True, SMALL_SIZE)  # type: ignore[arg-type]


def test_a_rank_writes_the_rates(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the only rank of a launcher."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("crossdock.cli.plan_calibrate.calibrate", partial(calibrate, size=SMALL_SIZE))
    path = tmp_path / "rates.json"
    code, out, err = run("plan", "--calibrate", str(path))
    assert (code, out, err) == (0, "", f"written: {path}\n")
    code, out, _ = run("plan", "--calibrate", str(path), "--json")
    assert code == 0 and out.count("\n") == 1 and json.loads(out) == json.loads(path.read_text())
    found = Cluster.from_json(json.loads(path.read_text()))
    assert (found.name, found.ranks_per_node, found.processor.ranks) == ("measured-1x1", 1, 1)
    code, out, _ = run("plan", *SMALL, "--cluster", str(path), "--set", "ranks_per_node=8", "--json")
    assert code == 0 and json.loads(out)["cluster"]["name"] == "measured-1x1"


def test_ranks_are_started_on_the_emulated_cluster(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []

    def start(command: list[str], shape: Shape, link: Link, *, debug: bool) -> int:
        started.append((command, shape, link))
        return 7

    monkeypatch.setattr("crossdock.cli.bench.cluster.run_on_cluster", start)
    options = ("plan", "--emulate", "2x2", "--calibrate", str(tmp_path / "rates.json"))
    assert run(*options)[0] == 7
    assert started == [([sys.executable, "-m", "crossdock", *options], Shape(2, 2), Link())]
