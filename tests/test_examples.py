"""Every example runs as its docstring says, prints what it claims, and stays under 40 lines, but for LONG ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.checkpoints import DEEPSEEK, save

ROOT = Path(__file__).parents[1]
LONG = {"train_example.py"}  # trains the bundled checkpoint: a script rather than an example
PRINTS = {
    "moe_layer.py": ["same bits on 1 and 4 ranks: True", "relative to the largest value: "],
    "balance.py": ["before: layer 0: busiest of 4 ranks", "after: layer 0: busiest of 4 ranks", "same bits: True"],
    "own_placement.py": ["rank 1 holds experts 0 2 3", "in slots [0, 3, 6, 0]", "same bits as on one rank: True"],
    "own_transport.py": ["rank 0: 6 rows in, 640 bytes out, weights add up to [1.0, 1.0, 0.5]", "rank 1: 4 rows in"],
}
ELSEWHERE = {"generate.py", "torchrun_layer.py"}  # have tests of their own


def run(*command: str) -> str:
    """stdout of a python command that must succeed, with only the checkout on its path."""
    kept = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_here_and_short() -> None:
    examples = {path.name: path for path in (ROOT / "examples").glob("*.py")}
    assert set(examples) == set(PRINTS) | ELSEWHERE | LONG
    for name in set(examples) - LONG:
        text = examples[name].read_text()
        assert len(text.splitlines()) < 40, name
        assert f"examples/{name}" in text, f"{name} does not say how it is run"


@pytest.mark.parametrize("name", PRINTS)
def test_example(name: str) -> None:
    out = run(f"examples/{name}")
    for words in PRINTS[name]:
        assert words in out


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)", text)]


def test_two_ranks_train_as_one_does() -> None:
    alone = losses(run("examples/torchrun_layer.py"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    together = losses(run(*launcher, "examples/torchrun_layer.py"))
    assert together == pytest.approx(alone, abs=2e-4)
    assert together[1] < together[0]


def word_tokenizer(vocabulary: int) -> Tokenizer:
    """Knows the words of the example's prompts; the other ids are words w5, w6, ..."""
    known = ["?", "def", "class", "for", "name", "in"]
    words = known + [f"w{number}" for number in range(len(known), vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_generate(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path)
    word_tokenizer(DEEPSEEK["vocab_size"]).save(str(tmp_path / "tokenizer.json"))
    out = run("examples/generate.py", str(tmp_path))
    assert out.count("---\n") == 4 and "0 of 0 drafted tokens accepted" in out
    bundled = ROOT / "crossdock" / "data" / "example" / "config.json"
    if bundled.is_file():
        drafted = re.search(r"(\d+) of (\d+) drafted", run("examples/generate.py"))
        assert drafted is not None and int(drafted[1]) > 0
