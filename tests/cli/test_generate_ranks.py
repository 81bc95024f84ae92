"""`crossdock generate` as a user runs it: the same tokens and the same logits on any number of real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
