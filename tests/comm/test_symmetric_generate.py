"""Generation over the symmetric transport gives the logits of one rank: from the command line, and in both modes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crossdock import generate as generate_tokens
from crossdock import load_model
from crossdock.comm import LocalTransport
from crossdock.comm.symmetric import SymmetricTransport
from crossdock.moe import MoELayer
from crossdock.moe.config import ExchangeConfig
from crossdock.parallel import EPGroup
from tests.launch import Ranks
from tests.models.checkpoints import save

PROMPTS = [[5, 17, 9, 33, 21, 4, 8], [3, 2]]
NEW_TOKENS = 6


def digest(directory: Path, *options: str) -> dict[str, Any]:
    """As a user types it, in an environment that says nothing of Triton's interpreter."""
    command = [sys.executable, "-m", "crossdock", "generate", str(directory), "--json", "--dtype", "float32"]
    command += [word for prompt in PROMPTS for word in ("--prompt-ids", ",".join(map(str, prompt)))]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--draft-tokens", "0", *options]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OMP_NUM_THREADS")
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def in_latency_mode(group: EPGroup, directory: str) -> tuple[str, int]:
    """The digest, and how many of its layers' exchanges there have been."""
    transport = SymmetricTransport(group)
    model: Any = load_model(directory, transport).model
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        layer._stand_on(transport, layer.placement, ExchangeConfig(mode="latency", max_tokens=8))
    result = generate_tokens(model, PROMPTS, transport, max_new_tokens=NEW_TOKENS)
    return result.digest, sum(layer.dispatcher.step for layer in layers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_ranks_change_nothing(family: str, tmp_path: Path, ranks_of_two: Ranks) -> None:
    save(family, tmp_path)
    model: Any = load_model(tmp_path, LocalTransport()).model
    expected = generate_tokens(model, PROMPTS, LocalTransport(), max_new_tokens=NEW_TOKENS).digest
    answer = digest(tmp_path, "--ranks", "2", "--transport", "symmetric")
    assert answer["transport"] == "symmetric" and answer["ranks"] == 2
    assert answer["logits_digest"] == expected
    for found, exchanges in ranks_of_two.run(in_latency_mode, str(tmp_path)):
        assert found == expected
        assert exchanges >= NEW_TOKENS
