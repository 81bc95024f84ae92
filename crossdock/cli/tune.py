"""`crossdock tune`: looks for faster tiles on this machine's GPU and keeps them for later runs.

Candidates come from gemm/candidates.py. Each is compiled for the GPU with no run, by the workers of `crossdock audit`;
those over hard limits (shared memory, spills) are dropped, the others ranked by that file's cost model, and the best of
them timed and verified (tune_search.py). What is found goes to the user's table (gemm/tables.py) with the versions it
holds for. `--dry-run` stops before the timing and needs no GPU.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.cli.audit import Target, compile_in_workers
from crossdock.cli.shapes import MODELS, products
from crossdock.errors import ConfigError

if TYPE_CHECKING:
    from crossdock.gemm.configs import Limits, Problem

DEFAULT_KINDS, DEFAULT_MODEL = ("bf16", "fp8_block"), "deepseek-v3"
DEFAULT_ROWS = ",".join(str(1 << power) for power in range(13))
MOST_ROWS = 1 << 18  # of one product: what no rank receives at once is not worth tuning for
SHOWN = 12


def tune(
    shape: Annotated[
        list[str] | None, typer.Option(help="Columns, inner size, groups of a product (repeatable).", metavar="N,K,L")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help=f"Products of {', '.join(MODELS)} (repeatable).", metavar="NAME")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share a model's experts.")] = 1,
    kind: Annotated[
        list[str] | None, typer.Option(help="bf16, fp8_block, fp8_row, bf16_swiglu, ... (repeatable).")
    ] = None,
    rows: Annotated[str, typer.Option(help="Rows a group, rounded up to powers of two.")] = DEFAULT_ROWS,
    best: Annotated[int, typer.Option(min=1, help="Candidates to time for each shape.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Table to write in place of the user's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compile and rank only; needs no GPU.")] = False,
    target: Annotated[Target, typer.Option(help="What --dry-run compiles for.")] = Target.sm_90,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Looks for faster tiles of the grouped products on this GPU, verifies them, and keeps them."""
    problems = plan(shape or [], model or [], ranks, kind or [], rows)
    import torch

    from crossdock.gemm import tables
    from crossdock.gemm.configs import TARGETS, limits_of

    if not dry_run and not torch.cuda.is_available():
        raise ConfigError("crossdock tune needs a GPU, and torch sees none; --dry-run compiles and ranks without one")
    if dry_run:
        limits = TARGETS[target.value]
        _show_ranked(compile_and_rank(problems, limits), limits, best, as_json)
        return
    path = output or tables.user_path()
    if path is None:
        raise ConfigError("there is no home folder to keep tiles in: name a file with --output")
    limits = limits_of(torch.device("cuda"))
    _show_found(_measure(compile_and_rank(problems, limits), limits, best, path), path, as_json)


def plan(shapes: list[str], models: list[str], ranks: int, kinds: list[str], rows: str) -> "list[Problem]":
    """What to tune, by the options. Raises ConfigError naming the option that cannot be."""
    from crossdock.gemm.configs import KINDS, Bucket, Problem

    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--kind must be one of {', '.join(KINDS)}, found {kind!r}")
    for name in models:
        if name not in MODELS:
            raise ConfigError(f"--model must be one of {', '.join(MODELS)}, found {name!r}")
    counts = _integers("--rows", rows)
    named = [_integers("--shape", text, 3) for text in shapes]
    found = []
    for kind in [each for each in KINDS if each in (kinds or DEFAULT_KINDS)]:
        wanted = [tuple(each) for each in named]
        for name in models or ([] if shapes else [DEFAULT_MODEL]):
            groups = -(-MODELS[name].experts // ranks)
            wanted += [(*MODELS[name].shape(product, kind), groups) for product in products(kind)]
        for columns, inner, groups in wanted:
            found += [Problem(kind, each * groups, groups, columns, inner) for each in counts]
    unique = {Bucket.of(problem): problem for problem in found if problem.rows <= max(MOST_ROWS, problem.groups)}
    return list(unique.values())


def _integers(option: str, text: str, count: int | None = None) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or (count is not None and len(found) != count):
        wanted = f"{count} positive integers" if count else "positive integers"
        raise ConfigError(f"{option} must be {wanted} with commas between, found {text!r}")
    return found


def compile_and_rank(problems: "list[Problem]", limits: "Limits") -> "list[tuple[Problem, list[Any]]]":
    """Every problem with its candidates, ranked. A device that is no target of the audit's is ranked without builds."""
    from crossdock.cli.tune_search import builds, rank

    compiled: dict[str, dict[str, Any]] = {}
    if limits.target in [target.value for target in Target]:
        work = builds(problems, limits)
        with _bar("compiling candidates", len(work)) as advance:
            for message in compile_in_workers({"targets": [limits.target], "builds": work}):
                if "total" not in message:
                    compiled[message["config"]] = message
                    advance()
    return [(problem, rank(problem, limits, compiled)) for problem in problems]


def _measure(ranked: "list[tuple[Problem, list[Any]]]", limits: "Limits", best: int, path: Path) -> list[Any]:
    """Times and verifies the best candidates of each problem; each is kept as soon as it is found."""
    import torch

    from crossdock.cli.bench.products import make
    from crossdock.cli.bench.timing import compare
    from crossdock.cli.tune_search import own_tile, search
    from crossdock.gemm import tables

    device, found = torch.device("cuda", torch.cuda.current_device()), []
    with torch.no_grad(), _bar("timing", len(ranked)) as advance:
        for problem, candidates in ranked:
            tiles = [candidate.tile for candidate in candidates if not candidate.why][:best]
            own = own_tile(problem, limits)
            product = make(problem, device, "triton")
            one = search(product, tiles, own, lambda calls: compare(calls, device))
            took = {"us": round(one.seconds * 1e6, 2), "formula_us": round(one.formula_seconds * 1e6, 2)}
            tables.store(path, torch.cuda.get_device_name(device), {one.bucket.key(): asdict(one.tile) | took})
            found.append(one)
            del product
            torch.cuda.empty_cache()
            advance()
    return found


class _bar:
    """A progress bar on stderr, where that is a terminal: `with _bar(...) as advance`."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def tile_text(tile: Any) -> str:
    """`64x128x64, 4 warps, 4 stages`."""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"


def _show_ranked(ranked: "list[tuple[Problem, list[Any]]]", limits: "Limits", best: int, as_json: bool) -> None:
    from crossdock.cli.tune_search import own_tile
    from crossdock.gemm.configs import Bucket

    result: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for problem, candidates in ranked:
        bucket = Bucket.of(problem)
        own = own_tile(problem, limits)
        result[bucket.key()] = [
            {"tile": asdict(c.tile), "predicted_us": c.seconds * 1e6, "dropped": c.why, "formula": c.tile == own}
            | (asdict(c.usage) if c.usage else {})
            for c in candidates
        ]
        for place, c in enumerate(candidates[: max(best, SHOWN)]):
            what = c.why or ("would be timed" if place < best else "")
            usage = f"{c.usage.registers}, {c.usage.shared_bytes / 1024:.0f} KB" if c.usage else ""
            what += " (the formula's)" if c.tile == own else ""
            rows.append((bucket.key() if place == 0 else "", tile_text(c.tile), f"{c.seconds * 1e6:.1f}", usage, what))
        dropped = sum(bool(c.why) for c in candidates)
        rows.append(("", f"{len(candidates)} candidates, {dropped} over limits", "", "", ""))
    if as_json:
        print(json.dumps({"target": limits.target, "ranked": result}))
    else:
        _table(("shape", "tile", "model us", "registers, shared", "what"), rows, f"candidates for {limits.target}")


def _show_found(found: list[Any], path: Path, as_json: bool) -> None:
    from crossdock.gemm import tables

    lines = [
        {
            "shape": one.bucket.key(),
            "tile": asdict(one.tile),
            "us": one.seconds * 1e6,
            "formula_us": one.formula_seconds * 1e6,
            "timed": one.timed,
            "rejected": [{"tile": asdict(tile), "why": why} for tile, why in one.rejected.items()],
        }
        for one in found
    ]
    if as_json:
        print(json.dumps({"path": str(path), "version": tables.version(), "tuned": lines}))
        return
    rows: list[tuple[str, ...]] = []
    for one in found:
        gain = one.formula_seconds / one.seconds
        why = f"fastest of {one.timed}" if gain > 1 else f"the formula's: none of {one.timed} is faster"
        why += f"; {len(one.rejected)} rejected: {next(iter(one.rejected.values()))}" if one.rejected else ""
        rows.append((one.bucket.key(), tile_text(one.tile), f"{one.seconds * 1e6:.1f}", f"{gain:.2f}x", why))
    _table(("shape", "tile", "us", "of the formula's", "why"), rows, f"kept in {path} for {tables.version()}")


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a log has no width to keep to
        console.width = 200
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
