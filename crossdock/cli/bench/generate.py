"""`bench generate`: prefill, decode and the memory of loading, against transformers on the same checkpoint.

Each run is a process of its own (generate_worker.py) with the same number of threads; contenders take turns, and the
median of each figure counts. `crossdock` drafts where the checkpoint has an MTP layer, as `crossdock generate` does;
`crossdock_plain` does not. "decode" continues the prompt that `generate` has by default, "long_decode" the one that was
prefilled: how much drafting gains depends on the text.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from crossdock.cli.bench.report import AsJson, Dtype, Plot, check_plot, deliver
from crossdock.cli.launch import RANK_THREADS
from crossdock.cli.request import EXAMPLE_PROMPT, example_directory, read_config_json
from crossdock.errors import ConfigError, CrossdockError


def generate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Hugging Face directory; the bundled example by default.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prefilled prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 128,
    dtype: Annotated[Dtype | None, typer.Option(help="What both compute in; the checkpoint's own by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each process; as generate by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each contender.")] = 3,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Prefill, decode (batch 1) and memory of loading, beside transformers."""
    check_plot(plot)
    directory = checkpoint or example_directory()
    config = read_config_json(directory, bundled=checkpoint is None)
    context = config.get("max_position_embeddings", 1 << 30)
    if prompt_tokens + new_tokens > context:
        raise ConfigError(f"{prompt_tokens} + {new_tokens} tokens are more than the model's context of {context}")
    contenders = ["crossdock", *(["crossdock_plain"] if config.get("num_nextn_predict_layers") else [])]
    if _has_transformers():
        contenders.append("transformers")
    job = {
        "directory": str(directory),
        "dtype": dtype.value if dtype else _own_dtype(config),
        "threads": threads or RANK_THREADS,
        "prompt": _prompt(directory, config["vocab_size"], prompt_tokens),
        "short_prompt": _short_prompt(directory, config["vocab_size"]),
        "new_tokens": new_tokens,
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in contenders:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            runs[name].append(_run(job | {"contender": name}))
    figures = {name: {key: median(run[key] for run in done) for key in done[0]} for name, done in runs.items()}
    deliver(_result(figures, job, prompt_tokens), "generate", as_json, plot)


def _own_dtype(config: dict[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype"))
    return name if name in Dtype.__members__ else Dtype.bfloat16.value


def _prompt(directory: Path, vocab_size: int, tokens: int) -> list[int]:
    """The start of a module of the standard library, or arbitrary ids where there is no tokenizer for it."""
    arbitrary = [(17 * i * i + 5 * i + 3) % vocab_size for i in range(tokens)]
    if not (directory / "tokenizer.json").is_file():
        return arbitrary
    from tokenizers import Tokenizer

    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    return ids[:tokens] if len(ids) >= tokens else arbitrary


def _short_prompt(directory: Path, vocab_size: int) -> list[int]:
    """What `generate` continues by default."""
    if not (directory / "tokenizer.json").is_file():
        return _prompt(directory, vocab_size, 7)
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(EXAMPLE_PROMPT).ids
    return ids


def _has_transformers() -> bool:
    from importlib.util import find_spec

    return find_spec("transformers") is not None


def _run(job: dict[str, Any]) -> dict[str, float]:
    """One process's figures. Raises CrossdockError with its last line where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, "-m", "crossdock.cli.bench.generate_worker"]
    done = subprocess.run(command, input=json.dumps(job), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CrossdockError(f"the {job['contender']} run ended with exit code {done.returncode}: {last}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _result(figures: dict[str, dict[str, float]], job: dict[str, Any], prompt_tokens: int) -> dict[str, Any]:
    """Rates of crossdock, and how many times a peer's they are (for memory: how many times less)."""
    cases = []
    ours = figures["crossdock"]
    peers = {name: other for name, other in figures.items() if name != "crossdock"}
    new_tokens = job["new_tokens"]
    for case, tokens in (("prefill", prompt_tokens), ("decode", new_tokens), ("long_decode", new_tokens)):
        seconds = {name: other[f"{case}_s"] for name, other in figures.items()}
        cases.append(
            {
                "case": case,
                "tokens_per_s": tokens / seconds["crossdock"],
                "peers_tokens_per_s": {name: tokens / seconds[name] for name in peers},
                "ratio": {name: seconds[name] / seconds["crossdock"] for name in peers},
            }
        )
    cases.append(
        {
            "case": "load",
            "tokens_per_s": None,
            "seconds": ours["load_s"],
            "peak_rss_bytes": ours["peak_rss_bytes"],
            "ratio": {name: other["peak_rss_bytes"] / ours["peak_rss_bytes"] for name, other in peers.items()},
        }
    )
    extra = {name: job[name] for name in ("dtype", "threads", "new_tokens")}
    return extra | {
        "prompt_tokens": prompt_tokens,
        "rss": {n: f["peak_rss_bytes"] for n, f in figures.items()},
        "cases": cases,
    }
