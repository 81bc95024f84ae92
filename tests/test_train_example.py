"""The script that trains the bundled checkpoint: resumed it equals uninterrupted, and what it writes loads."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from crossdock import generate, load_model
from crossdock.comm import LocalTransport

SCRIPT = Path(__file__).parent.parent / "examples" / "train_example.py"
SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64,
         "num_hidden_layers": 2, "kv_lora_rank": 32, "q_lora_rank": 48}  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a small model and a small corpus."""
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in SMALL.items():
        monkeypatch.setitem(module.CONFIG, name, value)
    texts = [f"def function_{i}(self):\n    return {i} + self.value\n" * 5 for i in range(80)]
    monkeypatch.setattr(module, "corpus", lambda: texts)
    monkeypatch.setattr(module, "SEQUENCES", 2)
    monkeypatch.setattr(module, "LENGTH", 24)
    return module


def trainer(script: ModuleType, out: Path) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    """A Trainer of six steps on a fresh model, and the token streams."""
    out.mkdir(exist_ok=True)
    model = script.DeepSeekModel(script.DeepSeekConfig.from_hf(script.CONFIG), LocalTransport(), dtype=torch.float32)
    script.initialise(model, 0)
    return script.Trainer(model, out, 6, 0), script.prepare(out)


def test_resumed_equals_uninterrupted_and_the_export_loads(script: ModuleType, tmp_path: Path) -> None:
    whole, streams = trainer(script, tmp_path / "whole")
    script.train(whole, *streams, minutes=1)
    first, streams = trainer(script, tmp_path / "parts")
    for _ in range(3):
        first.advance(streams[0])
    first.save()
    second, streams = trainer(script, tmp_path / "parts")
    script.train(second, *streams, minutes=1)
    assert second.step == whole.step == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.masters, second.masters, strict=True))
    script.export(second.model, tmp_path / "parts", tmp_path / "export")
    loaded = load_model(tmp_path / "export", LocalTransport(), dtype=torch.float32)
    assert loaded.report.unused == ()
    plain = generate(loaded.model, [[1, 2, 3]], LocalTransport(), max_new_tokens=8)
    drafted = generate(loaded.model, [[1, 2, 3]], LocalTransport(), max_new_tokens=8, draft_tokens=1)
    assert drafted.outputs == plain.outputs and drafted.drafted > 0
