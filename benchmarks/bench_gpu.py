"""`make bench-gpu`: the kernels' tests on this machine's GPU, then `bench router`, `gemm`, `layer`, in eight minutes.

Writes DATE-DEVICE-gpu.json and .md into benchmarks/results: correctness, every case, and the table of targets with what
was measured beside each. Each benchmark is a process of its own, so that one that fails costs its own rows only. Tests
run several files at once, as most of their time is the compiler's; nothing runs beside a benchmark.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
QUESTIONS = ("router", "gemm", "layer")
LIMIT_S, TESTS_S, TESTS_AT_ONCE = 480.0, 200.0, 6
Results = dict[str, Any]
Runner = Callable[[list[str], float], tuple[int, str, str]]  # arguments, seconds -> exit code, stdout, stderr


class Target(NamedTuple):
    """A line of the table: a figure, what it must be and better be, and the values of which the worst counts."""

    what: str
    unit: str
    sign: str  # "<=" or ">="
    must: float
    stretch: float
    values: Callable[[Results], list[float]]


def field(question: str, name: str, part: str, *variants: str) -> Callable[[Results], list[float]]:
    """A field of the cases that have `part` and one of `variants` in their name; "ratio.PEER" looks into the ratios."""

    def find(results: Results) -> list[float]:
        outer, _, peer = name.partition(".")
        cases = [case for case in results.get(question, {}).get("cases", []) if part in case["case"]]
        cases = [case for case in cases if not variants or any(each in case["case"] for each in variants)]
        return [case[outer][peer] if peer else case[outer] for case in cases if not peer or peer in case[outer]]

    return find


def of_copy(part: str) -> Callable[[Results], list[float]]:
    """Bytes a second of a product over what the device reaches when it only copies."""

    def find(results: Results) -> list[float]:
        copied = results.get("gemm", {}).get("ceilings", {}).get("copy_gbytes_per_s")
        return [value / copied for value in field("gemm", "gbytes_per_s", part)(results)]

    return find


def launches(results: Results) -> list[float]:
    """Of the routed path of a layer, as `bench layer` counts them."""
    found = results.get("layer", {}).get("launches_per_layer")
    return [] if found is None else [found]


TOPK, ROUTER = "deepseek-v3 topk", "deepseek-v3 router"
GATE_UP, DOWN, BLOCK_FP8 = "deepseek-v3 gate_up", "deepseek-v3 down", "fp8_block "
SMALL = ("T=1 ", "T=8 ", "T=16 ")
RATE, WAIT = "TFLOP/s", "us"
TARGETS = (
    Target("TopK, 1-64 tokens, E=256", WAIT, "<=", 2.6, 2.3, field("router", "us", TOPK, *SMALL, "T=64 ")),
    Target("TopK, 8192x256", WAIT, "<=", 15, 13, field("router", "us", TOPK, "T=8192 ")),
    Target("router GEMM + TopK, up to 16 tokens", WAIT, "<=", 7, 5.5, field("router", "us", ROUTER, *SMALL)),
    Target("router GEMM + TopK, 256 tokens", WAIT, "<=", 12, 10, field("router", "us", ROUTER, "T=256 ")),
    Target("router GEMM + TopK, 8192 tokens", WAIT, "<=", 80, 70, field("router", "us", ROUTER, "T=8192 ")),
    Target(
        "prefill FP8, 4096x7168", RATE, ">=", 1100, 1250, field("gemm", "tflops", f"{GATE_UP} prefill, {BLOCK_FP8}")
    ),
    Target("prefill FP8, 7168x2048", RATE, ">=", 950, 1050, field("gemm", "tflops", f"{DOWN} prefill, {BLOCK_FP8}")),
    Target("row-wise FP8 / F.scaled_grouped_mm", "x", ">=", 1.0, 1.15, field("gemm", "ratio.scaled_grouped_mm", "")),
    Target("decode FP8, gate-up / copy bandwidth", "x", ">=", 0.75, 0.85, of_copy(f"{GATE_UP} decode, {BLOCK_FP8}")),
    Target("decode FP8, down / copy bandwidth", "x", ">=", 0.70, 0.80, of_copy(f"{DOWN} decode, {BLOCK_FP8}")),
    Target("launches of a routed layer", "", "<=", 7, 6, launches),
)
ELSEWHERE = "Not measured here: ratios to DeepGEMM and to vLLM's kernels, which are not installed beside crossdock."


def run_process(arguments: list[str], seconds: float) -> tuple[int, str, str]:
    """python with `arguments` in the repository, at most so long; exit code 124 where that was too short."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1), check=False)
    except subprocess.TimeoutExpired:
        return 124, "", f"not finished after {seconds:.0f} s"
    return done.returncode, done.stdout, done.stderr


def kernel_tests() -> list[str]:
    """The files whose tests run kernels on a GPU where there is one."""
    found = [path for folder in ("gemm", "routing") for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))]
    marked = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8"))
    return [str(path.relative_to(ROOT)) for path in dict.fromkeys((*found, *marked))]


def correctness(files: list[str], run: Runner, seconds: float) -> Results:
    """What pytest says of each file: its last line, and whether all passed."""

    def one(name: str) -> tuple[str, Results]:
        left = deadline - time.monotonic()
        code, out, err = (
            run(["-m", "pytest", "-q", "-p", "no:cacheprovider", name], left) if left > 1 else (124, "", "")
        )
        said = (out.strip() or err.strip() or "not run: no time left").splitlines()[-1]
        return name, {"ok": code in (0, 5), "said": said}  # 5: all were deselected or skipped at import

    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(TESTS_AT_ONCE) as pool:
        return dict(pool.map(one, files))


def benchmarks(device: str, run: Runner, seconds: float) -> Results:
    """The JSON of each question; with "failed", where it did not end well."""
    results: Results = {}
    ends = time.monotonic() + seconds
    for question in QUESTIONS:
        arguments = ["-m", "crossdock", "bench", question, "--json", "--device", device]
        code, out, err = run(arguments, ends - time.monotonic())
        try:
            results[question] = json.loads(out)
        except ValueError:
            results[question] = {}
        if code:
            last = (err.strip() or "see what was left out").splitlines()[-1]
            results[question]["failed"] = f"exit code {code}: {last}"
    return results


def target_rows(results: Results) -> list[tuple[str, str, str, str, str]]:
    """The table's lines: what, must, stretch, measured, and whether it is met; empty where nothing was measured."""
    rows = []
    for target in TARGETS:
        values, less = target.values(results), target.sign == "<="
        bars = f"{target.sign} {target.must:g}", f"{target.sign} {target.stretch:g}"
        shown, met = "not measured", ""
        if values:
            worst = max(values) if less else min(values)
            reached = [worst <= bar if less else worst >= bar for bar in (target.must, target.stretch)]
            shown, met = (
                f"{worst:.3g} {target.unit}".strip(),
                ("stretch" if reached[1] else "yes" if reached[0] else "no"),
            )
        rows.append((target.what, *bars, shown, met))
    return rows


def markdown(results: Results) -> str:
    """The targets, then every case, as Markdown tables."""
    passed = sum(each["ok"] for each in results["correctness"].values())
    lines = [
        f"# {results['device']}, {results['date']}",
        "",
        f"{', '.join(f'{name} {version}' for name, version in results['versions'].items())}. "
        f"Kernel tests: {passed} of {len(results['correctness'])} files pass.",
        *(f"- {name}: {each['said']}" for name, each in results["correctness"].items() if not each["ok"]),
        "",
        *_rows(("target", "must", "stretch", "measured", "met"), target_rows(results)),
        "",
        ELSEWHERE,
    ]
    for question in QUESTIONS:
        lines += ["", f"## bench {question}", "", *_question(results[question])]
    return "\n".join(lines) + "\n"


def _question(found: Results) -> list[str]:
    """One benchmark's notes and cases."""
    notes = {name: found[name] for name in ("failed",) if name in found}
    notes |= found.get("ceilings", {}) | found.get("left_out", {})
    cases: list[Results] = found.get("cases", [])
    names = list(dict.fromkeys(name for case in cases for name, value in case.items() if value is not None))
    table = _rows(names, [[_text(case.get(name)) for name in names] for case in cases]) if names else []
    return [*(f"- {name}: {_text(value)}" for name, value in notes.items()), "", *table]


def _rows(columns: Any, rows: Any) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(device: str, name: str, files: list[str], run: Runner, limit_s: float = LIMIT_S) -> Results:
    """Everything, with what it was measured with. Benchmarks come second, and get what time the tests leave."""
    import torch
    import triton

    began = time.monotonic()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    results: Results = {"device": name, "date": date.today().isoformat(), "versions": versions}
    results["correctness"] = correctness(files, run, min(TESTS_S, limit_s / 2))
    return results | benchmarks(device, run, limit_s - (time.monotonic() - began))


def write(results: Results, folder: Path) -> list[Path]:
    """The two files, named by date and device."""
    slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    both = [folder / f"{results['date']}-{slug}-gpu.{kind}" for kind in ("json", "md")]
    both[0].write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    both[1].write_text(markdown(results), encoding="utf-8")
    return both


def main() -> int:
    """Exit code 1 where there is no GPU, a test fails or a benchmark does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all of it")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no GPU on this machine, so there is nothing to measure", file=sys.stderr)
        return 1
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    results = measure("cuda", torch.cuda.get_device_name(0), kernel_tests(), run_process, options.limit)
    for path in write(results, options.folder):
        print(f"written: {path}")
    for row in target_rows(results):
        print(" | ".join(row))
    failed = [name for name, each in results["correctness"].items() if not each["ok"]]
    failed += [f"bench {question}" for question in QUESTIONS if "failed" in results[question]]
    print(f"failed: {', '.join(failed)}" if failed else "all tests pass", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
