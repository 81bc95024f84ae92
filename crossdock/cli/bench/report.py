"""How a measurement is shown: a table with time, rates and ratios on one line, one JSON object, or a drawing."""

import json
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from crossdock.errors import ConfigError

T = TypeVar("T")


class Dtype(str, Enum):
    """The dtypes a benchmark can run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the ratios into this file (needs matplotlib).", metavar="FILE")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="float32 on a CPU, bfloat16 on a GPU by default.")]


def choose(device: str | None, dtype: Dtype | None) -> tuple[Any, Any]:
    """(torch.device, torch.dtype) to measure with. Raises ConfigError for a device that is not there."""
    import torch

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return chosen, getattr(torch, dtype.value if dtype else "bfloat16" if chosen.type == "cuda" else "float32")


def check_plot(path: Path | None) -> None:
    """Before anything is measured. Raises ConfigError where the drawing could not be made afterwards."""
    if path is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'crossdock[plot]'") from None
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}")


def progress(cases: Iterable[T], what: str) -> Iterable[T]:
    """The cases, with a bar on stderr while they are measured, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(list(cases), what, console=console, transient=True, disable=not console.is_terminal)


def deliver(result: dict[str, Any], title: str, as_json: bool, plot: Path | None) -> None:
    """Prints the result of one benchmark and draws it where asked."""
    if plot is not None:
        _draw(result["cases"], title, plot)
        print(f"drawn: {plot}", file=sys.stderr)
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        _show(result, title)


def _show(result: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a log has no width to keep to
        console.width = 200
    for name, value in result.items():
        if name != "cases":
            console.print(f"{name.replace('_', ' ')}: {_text(value)}", highlight=False)
    columns = list(dict.fromkeys(key for case in result["cases"] for key, value in case.items() if value is not None))
    table = Table(*(name.replace("_", " ") for name in columns), title=title)
    for case in result["cases"]:
        table.add_row(*(_text(case.get(name)) for name in columns))
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(_rounded(value))


def _rounded(value: Any) -> Any:
    return "" if value is None else round(value) if isinstance(value, float) else value


def _draw(cases: list[dict[str, Any]], title: str, path: Path) -> None:
    """One group of bars a case: how many times as fast as each peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6, 1.2 * len(cases)), 4), layout="constrained")
    peers = list(dict.fromkeys(peer for case in cases for peer in case["ratio"]))
    for number, peer in enumerate(peers):
        at = [i + 0.8 * number / len(peers) for i in range(len(cases))]
        axes.bar(at, [case["ratio"].get(peer, 0.0) for case in cases], 0.8 / len(peers), align="edge", label=peer)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.4 for i in range(len(cases))], [case["case"] for case in cases], rotation=30, ha="right")
    axes.set_ylabel("times as fast as the peer")
    axes.set_title(title)
    axes.legend()
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {str(error).splitlines()[0]}") from None
