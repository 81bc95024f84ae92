"""The benchmarks at toy sizes: what they compute, what they print, what they count."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crossdock.cli.bench import timing
from crossdock.cli.bench.exchange import _case
from crossdock.cli.runtime import Runtime
from crossdock.comm import make_transport
from crossdock.parallel import EPGroup
from tests.cli.conftest import Run
from tests.launch import Ranks


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every benchmark at a size that takes no time; one thread, as more only wait for one another at such sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "ROUND_S", 1e-4)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "measure_ceilings", lambda device, dtype: timing.Ceilings(10.0, 0.1))
    for name, value in {
        "router.HIDDEN": 32,
        "router.EXPERTS": 16,
        "router.TOKENS": (2, 5),
        "gemm.CPU_SHAPE": (4, 32, 32),
        "gemm.ROWS": (3, 9),
        "layer.CPU_SHAPE": {"hidden_size": 32, "expert_size": 16, "num_experts": 8, "top_k": 2},
        "layer.CASES": {"decode8": 8, "prefill2048": 24},
    }.items():
        module, constant = name.split(".")
        monkeypatch.setattr(sys.modules[f"crossdock.cli.bench.{module}"], constant, value)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(("question", "peers"), [("router", {"linear+topk"}), ("gemm", {"linear_loop", "grouped_mm"})])
def test_kernel_questions(run: Run, question: str, peers: set[str]) -> None:
    code, out, err = run("bench", question, "--json", "--device", "cpu")
    result = json.loads(out)
    assert (code, err) == (0, "") and result["ceilings"]["copy_gbytes_per_s"] == 10.0
    for case in result["cases"]:
        assert {"case", "device", "us", "tflops", "gbytes_per_s", "of_ceiling", "ratio"} <= set(case)
        assert set(case["ratio"]) == peers and case["us"] > 0


@pytest.mark.usefixtures("toy")
def test_layer_agrees_with_its_peer_and_draws(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "layer.png"
    code, out, err = run("bench", "layer", "--json", "--device", "cpu", "--plot", str(picture))
    result = json.loads(out)
    assert code == 0 and err == f"drawn: {picture}\n" and picture.stat().st_size > 1000
    assert result["launches_per_layer"] > 0 and [case["case"] for case in result["cases"]] == ["decode8", "prefill2048"]
    for case in result["cases"]:
        assert case["difference"] < 1e-5 and case["tokens_per_s"] > 0
        assert case["ratio"]["transformers"] == min(v for k, v in case["ratio"].items() if k != "transformers")
    code, out, _ = run("bench", "layer", "--device", "cpu")
    assert code == 0 and "launches per layer" in out


def test_launches_leave_out_views_and_allocations() -> None:
    x = torch.ones(4, 4)
    cpu = torch.device("cpu")
    assert timing.count_launches(lambda: x.view(-1)[1:].unsqueeze(0), cpu) == 0
    assert timing.count_launches(lambda: torch.empty(4).copy_(x[0] + 1), cpu) == 2


def test_ceiling_is_the_slower_bound() -> None:
    ceilings = timing.Ceilings(copy_gbytes_per_s=10.0, matmul_tflops=2.0)
    assert ceilings.share(operations=2e12, moved_bytes=1e9, seconds=2.0) == 0.5
    assert ceilings.share(operations=1e10, moved_bytes=10e9, seconds=4.0) == 0.25


def exchange_case(group: EPGroup) -> dict[str, object]:
    return _case(Runtime(group, make_transport(group)), 32, 4, "skewed")


def test_exchange_measures_only_what_it_can() -> None:
    with Ranks(2) as ranks:
        cases = ranks.run(exchange_case)
    for case in cases:
        assert case["us"] > 0 and case["exchange_speedup_bf16"] == pytest.approx(case["plain_us"] / case["us"])
        assert case["internode_bytes"] == case["internode_bytes_minimum"] == 0
        assert case["exchange_speedup_fp8"] is case["hidden_fraction"] is case["speedup_fp8"] is None
