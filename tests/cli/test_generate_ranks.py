"""`crossdock generate` as a user runs it: the same tokens and the same logits on any number of real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.models.checkpoints import greedy, save

PROMPT = [5, 17, 9, 33, 21, 4, 8]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def generate(directory: Path, launcher: list[str], *options: str) -> dict[str, Any]:
    """The JSON that `generate` prints, with the threads it chooses by itself."""
    command = [sys.executable, *launcher, "-m", "crossdock", "generate", str(directory), "--json", "--dtype", "float32"]
    command += ["--prompt-ids", ",".join(map(str, PROMPT)), "--max-new-tokens", "24", *options]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    answer: dict[str, Any] = json.loads(line)
    return answer


@pytest.mark.parametrize(
    ("family", "runs"),
    [
        ("qwen3_moe", [([], "1"), ([], "2")]),
        ("deepseek_v3", [([], "1"), ([], "4"), (TORCHRUN, None)]),
    ],
)
def test_ranks_change_nothing(family: str, runs: list[tuple[list[str], str | None]], tmp_path: Path) -> None:
    expected = greedy(save(family, tmp_path), PROMPT, 24)
    digests = set()
    for launcher, ranks in runs:
        answer = generate(tmp_path, launcher, *(["--ranks", ranks] if ranks else []))
        assert answer["outputs"][0]["token_ids"] == expected
        assert answer["ranks"] == int(ranks or 2) == len(answer["expert_load"]["per_rank"])
        digests.add(answer["logits_digest"])
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("plain", "otherwise"),
    [
        ([], ["--chunks", "3", "--two-batch", "--prompt-ids", "3,1,4,1,5"]),
        ([], ["--transport", "symmetric", "--mode", "latency"]),
        (["--wire", "fp8"], ["--wire", "fp8", "--chunks", "0", "--hierarchy", "node"]),  # one node: as flat
    ],
)
def test_how_rows_travel_changes_nothing(plain: list[str], otherwise: list[str], tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path)
    beside = otherwise[otherwise.index("--prompt-ids") :] if "--prompt-ids" in otherwise else []
    expected = generate(tmp_path, [], *plain, *beside)
    found = generate(tmp_path, [], *otherwise, "--ranks", "2")
    assert found["logits_digest"] == expected["logits_digest"] and found["outputs"] == expected["outputs"]


def test_a_timeline_of_every_rank(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path)
    generate(tmp_path, [], "--ranks", "2", "--trace", str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert {"experts", "route"} <= {event["name"] for event in events}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that takes nothing")
def test_a_timeline_that_cannot_be_written_loses_no_result(run: Run, tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path)
    options = ("generate", str(tmp_path), "--prompt-ids", "5,17", "--max-new-tokens", "3", "--json")
    code, expected, _ = run(*options)
    assert code == 0
    code, out, err = run(*options, "--trace", "/dev/full")
    assert code == 1 and err.startswith("error: the trace cannot be written to /dev/full: No space left")
    assert json.loads(out)["outputs"] == json.loads(expected)["outputs"]
