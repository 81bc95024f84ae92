"""The benchmarks at toy sizes: what they compute, what they print, what they count."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crossdock.cli.bench import timing
from crossdock.cli.bench.launches import record_launches
from crossdock.cli.bench.router import DEEPSEEK
from crossdock.comm import LocalTransport
from tests.cli.conftest import Run


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every benchmark at a size that takes no time; one thread, as more only wait for one another at such sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "ROUND_S", 1e-4)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "measure_ceilings", lambda device, dtype: timing.Ceilings(10.0, 0.1))
    for name, value in {
        "router.ROUTERS": {"deepseek-v3": (32, 16, DEEPSEEK | {"top_k": 2})},
        "router.TOKENS": {"cpu": (2, 5)},
        "gemm.CPU_SHAPE": (4, 32, 32),
        "gemm.ROWS": (3, 9),
        "gemm.CPU_FP8_SHAPE": (2, 128, 128),
        "gemm.FP8_ROWS": (3,),
        "layer.CPU_SHAPE": {"hidden_size": 32, "expert_size": 16, "num_experts": 8, "top_k": 2},
        "layer.CASES": {"decode8": 8, "prefill2048": 24},
    }.items():
        module, constant = name.split(".")
        monkeypatch.setattr(sys.modules[f"crossdock.cli.bench.{module}"], constant, value)
    yield
    torch.set_num_threads(threads)


PEERS = {
    "router": {"deepseek-v3 router": {"linear+topk"}, "deepseek-v3 topk": {"torch_topk"}},
    "gemm": {
        "product, fp32 ": {"linear_loop", "grouped_mm", "reference"},
        "product and SwiGLU, fp32_swiglu ": {"two_launches", "reference"},
        "product, fp8_block ": {"linear_loop_bf16", "reference"},
        "product, fp8_row ": {"scaled_mm_loop", "reference"},
    },
}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("question", PEERS)
def test_kernel_questions(run: Run, question: str) -> None:
    code, out, err = run("bench", question, "--json", "--device", "cpu")
    result = json.loads(out)
    assert (code, err) == (0, "") and result["ceilings"]["copy_gbytes_per_s"] == 10.0
    for start, peers in PEERS[question].items():
        cases = [case for case in result["cases"] if case["case"].startswith(start)]
        assert cases
        for case in cases:
            assert {"case", "device", "us", "tflops", "gbytes_per_s", "of_ceiling", "ratio"} <= set(case)
            assert set(case["ratio"]) == peers and case["us"] > 0


@pytest.mark.usefixtures("toy")
def test_one_kind_of_product(run: Run) -> None:
    code, out, _ = run("bench", "gemm", "--json", "--device", "cpu", "--kind", "fp8_row")
    assert code == 0 and all("fp8_row" in case["case"] for case in json.loads(out)["cases"])
    for options, error in ((("--kind", "x"), "no case is of kind x"), (("--model", "x"), "--model must be one of")):
        code, out, err = run("bench", "gemm", "--device", "cpu", *options)
        assert (code, out) == (1, "") and error in err


@pytest.mark.usefixtures("toy")
def test_layer_agrees_with_its_peer_and_draws(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "layer.png"
    code, out, err = run("bench", "layer", "--json", "--device", "cpu", "--dtype", "float32", "--plot", str(picture))
    result = json.loads(out)
    assert code == 0 and err == f"drawn: {picture}\n" and picture.stat().st_size > 1000
    assert 0 < result["launches_per_layer"] <= 7 and 0 < result["launches_per_decoder_layer"] <= 12
    assert [case["case"] for case in result["cases"]] == ["decode8", "prefill2048"]
    for case in result["cases"]:
        assert case["difference"] < 1e-5 and case["tokens_per_s"] > 0
        assert case["ratio"]["transformers"] == min(v for k, v in case["ratio"].items() if k != "transformers")
    code, out, _ = run("bench", "layer", "--device", "cpu")
    assert code == 0 and "launches per layer" in out


def test_launches_leave_out_views_and_allocations() -> None:
    x = torch.ones(4, 4)
    with record_launches(torch.device("cpu")) as names:
        torch.empty(4).copy_(x.view(-1)[1:].unsqueeze(0)[0, :4] + 1)
    assert names == ["add", "copy_"]


def test_ceiling_is_the_slower_bound() -> None:
    ceilings = timing.Ceilings(copy_gbytes_per_s=10.0, matmul_tflops=2.0)
    assert ceilings.share(operations=2e12, moved_bytes=1e9, seconds=2.0) == 0.5
    assert ceilings.share(operations=1e10, moved_bytes=10e9, seconds=4.0) == 0.25


@pytest.mark.parametrize(("is_low", "returned"), [(True, 4), (False, 0)])
def test_kept_memory_is_returned_between_rounds_where_it_runs_low(
    is_low: bool, returned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first round, and three that count."""
    calls: list[int] = []
    monkeypatch.setattr(timing, "memory_is_low", lambda: is_low)
    monkeypatch.setattr(timing, "return_freed_memory", lambda: calls.append(1))
    times = timing.compare_ranks({"one": lambda: None}, LocalTransport(), torch.device("cpu"), 1.0, 3)
    assert len(times["one"]) == 3 and len(calls) == returned
