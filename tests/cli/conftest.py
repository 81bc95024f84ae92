"""How these tests run the command line: in this process where nothing is launched, as a user would where ranks are."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crossdock.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("doctor", "--json") -> (exit code, stdout, stderr), in this process."""

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def start(*argv: str, **options: object) -> "subprocess.Popen[str]":
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "crossdock", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with a config.json that is enough for everything before weights are read."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {"model_type": "qwen3_moe", "vocab_size": 100, "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"unused": torch.zeros(1)}, folder / "model.safetensors")
    return folder
