"""The tuner without a GPU: what it refuses, how it ranks, whom it trusts, with the interpreter and a made-up clock."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.cli import tune as tune_module
from crossdock.cli.audit_tiles import retile
from crossdock.cli.audit_worker import find_specs
from crossdock.cli.bench.products import Product, make
from crossdock.cli.tune import plan
from crossdock.cli.tune_search import build_name, build_spec, builds, distance, rank, same_bits, search
from crossdock.errors import ConfigError, CrossdockError
from crossdock.gemm import configs, hopper, tables
from crossdock.gemm.configs import TARGETS, Bucket, Problem, TileConfig, formula
from tests.cli.conftest import Run

pytest.importorskip("triton")

CPU = torch.device("cpu")
TINY = Problem("fp32", 6, 3, 40, 24)
OWN = formula(Bucket.of(TINY), TARGETS["sm_90"])
FASTER, SLOWER, FOREIGN = (replace(OWN, num_stages=stages) for stages in (4, 5, 6))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(run: Run) -> None:
    code, out, err = run("tune", "--shape", "64,64,4")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "needs a GPU" in err and "--dry-run" in err


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--kind", "int4"], "--kind must be one of bf16,"),
        (["--model", "gpt"], "--model must be one of deepseek-v3,"),
        (["--shape", "64,64"], "--shape must be 3 positive integers"),
        (["--shape", "64,x,4"], "--shape must be 3 positive integers"),
        (["--rows", "0"], "--rows must be positive integers"),
    ],
)
def test_options_are_checked_first(run: Run, argv: list[str], error: str) -> None:
    code, out, err = run("tune", "--dry-run", *argv)
    assert (code, out) == (1, "") and error in err and err.count("\n") == 1


def test_what_is_tuned() -> None:
    assert plan(["40,24,3"], [], 1, ["fp32"], "2") == [TINY]
    assert len(plan(["40,24,3"], [], 1, ["fp32"], "3,4")) == 1  # one bucket
    found = plan([], ["kimi-k2"], 8, ["fp8_block", "fp8_block_swiglu"], "8")
    assert [(p.kind, p.columns, p.inner, p.groups) for p in found] == [
        ("fp8_block", 4096, 7168, 48),
        ("fp8_block", 7168, 2048, 48),
        ("fp8_block_swiglu", 2048, 7168, 48),
    ]
    assert {p.kind for p in plan([], [], 1, [], "1")} == {"bf16", "fp8_block"}
    assert max(p.rows for p in plan([], [], 1, [], "1,4096")) <= tune_module.MOST_ROWS


def test_dry_run_compiles_drops_and_ranks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three candidates, really compiled, of which one holds more than a block may have on gfx942."""
    wide = TileConfig(128, 256, 64, 8, 3)
    monkeypatch.setattr(
        "crossdock.cli.tune_search.candidates", lambda kind, limits: [wide, TileConfig(64, 64, 64, 4, 2)]
    )
    options = ("tune", "--dry-run", "--shape", "4096,7168,32", "--kind", "bf16", "--rows", "1024", "--target", "gfx942")
    code, out, err = run(*options, "--json")
    assert (code, err) == (0, "")
    (ranked,) = json.loads(out)["ranked"].values()
    assert len(ranked) == 3 and [bool(each["dropped"]) for each in ranked] == [False, False, True]
    assert "shared memory" in ranked[-1]["dropped"] and ranked[-1]["tile"]["block_n"] == 256
    assert ranked[0]["predicted_us"] <= ranked[1]["predicted_us"] and all(each["registers"] for each in ranked)
    assert sum(each["formula"] for each in ranked) == 1


def test_ranking_names_why_a_candidate_is_dropped() -> None:
    limits, problem = TARGETS["sm_90"], Problem("fp8_block", 256, 32, 4096, 7168)
    own = formula(Bucket.of(problem), limits)
    result = {"registers": 200, "spills": 16, "shared_bytes": 1000, "why": "the main loop spills (16)"}
    ranked = rank(problem, limits, {build_name(problem, own): result})
    assert ranked[-1].tile == own and ranked[-1].why == "the main loop spills (16)"
    kept = [each for each in ranked if not each.why]
    assert len(kept) > 10 and [each.seconds for each in kept] == sorted(each.seconds for each in kept)


def test_builds_are_shared_between_shapes_and_put_into_the_kernels_spec() -> None:
    limits, problem = TARGETS["sm_90"], Problem("bf16", 256, 32, 4096, 7168)
    alike = replace(problem, rows=4096, columns=7168, inner=2048)
    assert builds([problem], limits) == builds([problem, replace(problem, rows=128)], limits)
    first = builds([problem, alike], limits)
    assert len({each["build"] for each in first}) == len(first)
    spec = build_spec([s for s in find_specs([]) if s.kind], first[0], "sm_90")
    tile = first[0]["tile"]
    assert spec.config == first[0]["build"] and spec.constexprs["BLOCK_M"] == tile["block_m"]
    assert (spec.num_warps, spec.num_stages) == (tile["num_warps"], tile["num_stages"])
    assert spec.constexprs["EVEN_N"] and not spec.constexprs.get("GATHER") and not spec.constexprs.get("MASKED")
    odd = retile(spec, replace(problem, columns=100, inner=100, groups=5), OWN)
    assert not odd.constexprs["EVEN_N"] and not odd.constexprs["EVEN_K"] and odd.constexprs["L_POW2"] == 8


def fake_clock(seconds: dict[TileConfig, float]) -> Callable[[dict[str, Callable[[], Any]]], dict[str, float]]:
    """A timer that runs each contender once and says what it was told to."""
    by_name = {str(tile): took for tile, took in seconds.items()}

    def timer(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: by_name[name] for name in calls}

    return timer


@pytest.mark.parametrize("kind", ["fp32", "fp8_block", "fp8_block_swiglu", "fp8_row", "bf16_swiglu"])
def test_the_fastest_that_keeps_the_bits_wins(kind: configs.Kind) -> None:
    """In the interpreter, where stages change nothing, so that every candidate is right."""
    problem = replace(TINY, kind=kind, columns=128, inner=128)
    own = formula(Bucket.of(problem), TARGETS["sm_90"])
    faster, slower = replace(own, num_stages=5), replace(own, num_stages=6)
    product = make(problem, CPU, "triton")
    found = search(product, [slower, faster, own], own, fake_clock({own: 2e-5, faster: 1e-5, slower: 3e-5}))
    assert (found.tile, found.seconds, found.formula_seconds) == (faster, 1e-5, 2e-5)
    assert found.timed == 3 and not found.rejected
    noise = search(product, [faster], own, fake_clock({own: 1.01e-5, faster: 1e-5}))
    assert noise.tile == own and noise.seconds == noise.formula_seconds == 1.01e-5


def scripted(answers: dict[TileConfig, Any], reference: torch.Tensor) -> Product:
    """A product whose answer follows the tile that `choose` gives."""

    def call() -> torch.Tensor:
        answer = answers[configs.choose(TINY, CPU)]
        if isinstance(answer, Exception):
            raise answer
        return torch.as_tensor(answer)

    return Product(TINY, call, lambda: reference, 1.0, 1.0)


def test_other_bits_and_failing_launches_are_rejected_however_fast() -> None:
    right = torch.tensor([[1.0, 2.0]])
    wrong = right * (1 + 2.0**-23)
    answers = {OWN: right, FASTER: wrong, SLOWER: right, FOREIGN: RuntimeError("out of resource\nmore")}
    product = scripted(answers, right)
    found = search(product, [FASTER, SLOWER, FOREIGN], OWN, fake_clock({OWN: 1e-5, SLOWER: 2e-5}))
    assert found.tile == OWN
    assert found.rejected == {FASTER: "other bits than the formula's tile", FOREIGN: "cannot run: out of resource"}


@pytest.mark.parametrize("answer", [[[1.0, 2.1]], [[1.0, float("nan")]]])
def test_a_wrong_formula_is_an_error(answer: list[list[float]]) -> None:
    with pytest.raises(CrossdockError, match=r"fp32 N=40 .* gives a wrong product"):
        search(scripted({OWN: answer}, torch.tensor([[1.0, 2.0]])), [], OWN, fake_clock({OWN: 1.0}))


def test_bits_and_distance() -> None:
    x = torch.tensor([[0.0, float("nan")]])
    assert same_bits(x, x.clone()) and not same_bits(x, torch.tensor([[-0.0, float("nan")]]))
    codes, scales = torch.ones(2, 256, dtype=torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    assert distance((codes, scales), (codes, scales)) == 0.0 and same_bits((codes, scales), (codes, scales))
    assert distance((codes, scales), (codes, scales * 1.1)) == pytest.approx(1 - 2.2 / 2.21)
    assert distance(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0


def test_what_is_found_is_kept_and_used(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole command on a pretended GPU: its products run in the interpreter, its clock is made up."""
    path, tile = tmp_path / "tuned.json", replace(OWN, num_stages=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended")
    monkeypatch.setattr(configs, "limits_of", lambda device: replace(TARGETS["sm_90"], target="sm_89"))
    monkeypatch.setattr("crossdock.cli.tune_search.candidates", lambda kind, limits: [tile])
    monkeypatch.setattr(
        "crossdock.cli.bench.products.make", lambda problem, device, backend: make(problem, CPU, backend)
    )
    monkeypatch.setattr(
        "crossdock.cli.bench.timing.compare", lambda calls, device: fake_clock({OWN: 2e-5, tile: 1e-5})(calls)
    )
    options = ("tune", "--shape", "40,24,3", "--kind", "fp32", "--rows", "2", "--output", str(path))
    code, out, err = run(*options, "--json")
    assert (code, err) == (0, "")
    (line,) = json.loads(out)["tuned"]
    assert line["tile"]["num_stages"] == 4 and line["us"] == pytest.approx(10.0)
    key = Bucket.of(TINY).key()
    assert tables.holding(path, "Pretended")[key] == vars(tile) | {"us": 10.0, "formula_us": 20.0}
    code, out, _ = run(*options)
    assert code == 0 and "2.00x" in out and "fastest of 2" in out and key in out


def test_a_candidate_that_fails_does_not_cost_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no such tile")

    monkeypatch.setattr(hopper, "_launch", lambda kind: fails)
    with configs.trial("bf16", OWN), pytest.raises(RuntimeError, match="no such tile"):
        hopper._guarded("bf16", lambda: "portable")
    assert not hopper._given_up
    with pytest.warns(UserWarning, match="no such tile"):
        assert hopper._guarded("bf16", lambda: "portable") == "portable"
    hopper._given_up.clear()


def test_no_home_and_no_output_is_said(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(configs, "limits_of", lambda device: replace(TARGETS["sm_90"], target="sm_89"))
    monkeypatch.setattr(tables, "user_path", lambda: None)
    code, _, err = run("tune", "--shape", "40,24,3", "--kind", "fp32", "--rows", "2")
    assert code == 1 and "--output" in err


def test_a_plan_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="found 'a'"):
        plan(["a"], [], 1, [], "1")
