"""What a GPU's benchmarks are made of, on a machine without one: products, peers, the clock's turns, the report."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_gpu
from crossdock.cli import main
from crossdock.cli.bench import timing
from crossdock.cli.bench.gpu_clock import FEWEST_ROUNDS, MOST_ROUNDS, UNROLLED, compare_on_gpu
from crossdock.cli.bench.products import make
from crossdock.cli.shapes import MODELS, production
from crossdock.cli.tune_search import distance
from crossdock.gemm.configs import KINDS, Kind, Problem

CPU = torch.device("cpu")
gemm = sys.modules["crossdock.cli.bench.gemm"]  # the package's own name for it is the command
router = sys.modules["crossdock.cli.bench.router"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_its_specification_and_its_peers_agree(kind: Kind) -> None:
    product = make(Problem(kind, 37, 5, 128, 256), CPU)
    expected = product.reference()
    assert distance(product.call(), expected) < 1e-4
    columns = 256 if kind.endswith("_swiglu") else 128
    assert product.operations == 2 * 37 * columns * 256 and product.moved_bytes > 37 * 256
    able, left_out = timing.comparable(product.peers)
    assert able and set(left_out) <= {"scaled_mm_loop", "scaled_grouped_mm"}
    for peer in able.values():
        found = peer()
        assert distance(torch.cat(found) if isinstance(found, list) else found, expected) < 1e-4


def test_a_products_inputs_are_the_same_each_time() -> None:
    one, other = (make(Problem("bf16", 9, 4, 16, 16), CPU).call() for _ in range(2))
    assert torch.equal(one, other)


def test_the_gpu_cases_are_those_of_the_models() -> None:
    cases = dict(gemm._gpu_cases(list(MODELS)))
    assert cases["deepseek-v3 gate_up prefill"].groups == 32 and cases["kimi-k2 down decode, all experts"].groups == 384
    shapes = {(p.kind, p.columns, p.inner) for _, p in gemm._gpu_cases(["deepseek-v3"])}
    assert {
        ("bf16", 4096, 7168),
        ("fp8_block", 7168, 2048),
        ("fp8_row", 4096, 7168),
        ("bf16_swiglu", 2048, 7168),
    } <= shapes
    assert ("fp8_block", 3072, 4096) in {(p.kind, p.columns, p.inner) for p in production("fp8_block")}


class FakeClock:
    """Takes what it is told for each call, counts them, and makes graphs of all but those that wait."""

    def __init__(self, waits: tuple[str, ...] = ()) -> None:
        self.turns: list[tuple[str, bool]] = []
        self.waits = waits

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
        calls: list[str] = []
        self.into = calls
        call()
        return (lambda: calls), calls[0] not in self.waits

    def seconds(self, run: Callable[[], Any], flush: bool) -> float:
        calls = run()
        self.turns.append((calls[0], flush))
        return len(calls) * {"quick": 1e-5, "slow": 1e-4}[calls[0]]


@pytest.mark.parametrize(("flush", "calls"), [(True, 1), (False, UNROLLED)])
def test_contenders_take_turns_cold_or_warm(flush: bool, calls: int) -> None:
    clock = FakeClock(waits=("slow",))
    contenders = {name: lambda name=name: clock.into.append(name) for name in ("quick", "slow")}
    took = compare_on_gpu(contenders, clock, flush)
    assert took == {"quick": pytest.approx(1e-5), "slow": pytest.approx(1e-4)} and took.eager == ("slow",)
    names = [name for name, cold in clock.turns if cold == flush]
    assert names == ["quick", "slow"] * (len(names) // 2)
    assert 2 * FEWEST_ROUNDS < len(names) <= 2 * (MOST_ROUNDS + 1)


def test_ceilings_of_fp8_are_its_own() -> None:
    ceilings = timing.Ceilings(copy_gbytes_per_s=1e6, matmul_tflops=1.0, fp8_tflops=2.0)
    assert ceilings.share(1e12, 0, 1.0) == 1.0 and ceilings.share(1e12, 0, 1.0, fp8=True) == 0.5
    assert timing.Ceilings(1e6, 1.0).share(1e12, 0, 1.0, fp8=True) == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_bench_gpu_is_one_line() -> None:
    script = Path(bench_gpu.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr


def in_this_process(capsys: pytest.CaptureFixture[str]) -> bench_gpu.Runner:
    """Runs what bench_gpu would start: crossdock here, pytest not at all."""

    def run(arguments: list[str], seconds: float) -> tuple[int, str, str]:
        if arguments[1] == "pytest":
            return (1, "1 failed", "") if "test_bad" in arguments[-1] else (0, "3 passed in 1s", "")
        if arguments[3] == "layer":
            return 1, "", "error: no layer here"
        capsys.readouterr()
        code = main(arguments[2:])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_whole_report_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "ROUND_S", 1e-4)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "measure_ceilings", lambda device, dtype: timing.Ceilings(10.0, 0.1))
    monkeypatch.setattr(
        gemm, "_cpu_cases", lambda dtype: [("deepseek-v3 gate_up decode", Problem("fp8_block", 3, 2, 128, 128))]
    )
    monkeypatch.setattr(router, "TOKENS", {"cpu": (1, 8)})
    results = bench_gpu.measure(
        "cpu", "A CPU, (tiny)", ["tests/test_good.py", "tests/test_bad.py"], in_this_process(capsys)
    )
    assert results["correctness"]["tests/test_bad.py"] == {"ok": False, "said": "1 failed"}
    assert results["layer"] == {"failed": "exit code 1: error: no layer here"}
    table, text = bench_gpu.write(results, tmp_path)
    assert table.name == f"{results['date']}-a-cpu-tiny-gpu.json" and json.loads(table.read_text()) == results
    said = text.read_text()
    assert "1 of 2 files pass" in said and "- tests/test_bad.py: 1 failed" in said and "no layer here" in said
    rows = {row[0]: row for row in bench_gpu.target_rows(results)}
    assert rows["TopK, 1-64 tokens, E=256"][1:3] == ("<= 2.6", "<= 2.3") and rows["TopK, 1-64 tokens, E=256"][4] == "no"
    assert rows["decode FP8, gate-up / copy bandwidth"][4] == "no"
    assert rows["prefill FP8, 4096x7168"][3:] == rows["launches of a routed layer"][3:] == ("not measured", "")


def test_targets_are_met_by_the_worst_of_their_cases() -> None:
    cases = [
        {
            "case": f"deepseek-v3 gate_up prefill, fp8_{kind} R=1",
            "tflops": tflops,
            "gbytes_per_s": 900.0,
            "ratio": ratio,
        }
        for kind, tflops, ratio in (("block", 1150.0, {}), ("row", 1.0, {"scaled_grouped_mm": 1.2}))
    ]
    topk = [
        {"case": f"deepseek-v3 topk T={t} E=256", "us": us, "ratio": {}}
        for t, us in ((1, 2.2), (64, 2.25), (8192, 16.0))
    ]
    results = {"gemm": {"cases": cases, "ceilings": {"copy_gbytes_per_s": 1000.0}}, "router": {"cases": topk}}
    results["layer"] = {"launches_per_layer": 6}
    met = {row[0]: row[3:] for row in bench_gpu.target_rows(results)}
    assert met["prefill FP8, 4096x7168"] == ("1.15e+03 TFLOP/s", "yes")
    assert met["TopK, 1-64 tokens, E=256"] == ("2.25 us", "stretch") and met["TopK, 8192x256"] == ("16 us", "no")
    assert met["row-wise FP8 / F.scaled_grouped_mm"] == ("1.2 x", "stretch")
    assert met["launches of a routed layer"] == ("6", "stretch")


def test_kernel_tests_are_found() -> None:
    assert "tests/gemm/test_grouped.py" in bench_gpu.kernel_tests()


def test_a_process_that_takes_too_long_is_ended() -> None:
    code, _, err = bench_gpu.run_process(["-c", "import time; time.sleep(60)"], 1.0)
    assert code == 124 and "not finished" in err
