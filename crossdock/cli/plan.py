"""`crossdock plan`: what a layer's exchange will cost on machines that are not here (see `crossdock.simulate`).

crossdock plan deepseek-v3 --cluster h100-400g --plot plan.png         schedules compared, 8 to 1024 ranks
crossdock plan DIR --ranks 64 --trace choices.npy --placement balanced
crossdock plan --set inter.bytes_per_s=90e9 --set ranks_per_node=4     another network
crossdock plan --emulate 2x2 --calibrate rates.json                    this machine's rates, as root
crossdock plan --cluster rates.json --check exchange.json              predicted beside measured
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.cli.bench.report import AsJson, check_plot
from crossdock.errors import ConfigError

if TYPE_CHECKING:
    from crossdock.simulate import Choice, Cluster, LayerShape

RANKS = "8,16,32,64,128,256,512,1024"
MOST_CHOICES = 1 << 26  # (token, k) of all ranks: 1024 ranks of 8192 tokens of 8

Several = list[str] | None


def plan(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder with a config.json, or a model's name.")] = "deepseek-v3",
    cluster: Annotated[str, typer.Option(help="h100-400g, emulated-2x2, ... or a file.")] = "h100-400g",
    values: Annotated[Several, typer.Option("--set", help="Another value (repeatable).", metavar="NAME=VALUE")] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas between.")] = RANKS,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens a rank.")] = 4096,
    skew: Annotated[float, typer.Option(help="Popularity of experts is place to the power of -skew.")] = 0.0,
    trace: Annotated[Path | None, typer.Option(help="A .npy or .json of K expert ids a token, or of E loads.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of routing that is drawn.")] = 0,
    hierarchy: Annotated[Several, typer.Option(help="flat, node; ring, plain to compare (repeatable).")] = None,
    wire: Annotated[Several, typer.Option(help="bf16 or fp8 (repeatable).")] = None,
    chunks: Annotated[str, typer.Option(help="Numbers of chunks, with commas between.")] = "1,2,4",
    overlap: Annotated[bool, typer.Option(help="Whether chunks travel while others compute.")] = True,
    placement: Annotated[Several, typer.Option(help="contiguous or balanced (repeatable).")] = None,
    spare: Annotated[int, typer.Option(min=0, help="Slots a rank for replicas, where balanced.")] = 1,
    calibrate: Annotated[Path | None, typer.Option(help="Write rates of ranks here.", metavar="FILE")] = None,
    emulate: Annotated[str | None, typer.Option(help="Of N emulated nodes of M ranks.", metavar="NxM")] = None,
    check: Annotated[Path | None, typer.Option(help="What bench exchange --json printed.", metavar="FILE")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison (needs matplotlib).", metavar="FILE")] = None,
    as_json: AsJson = False,
) -> None:
    """Predicts a layer's time, bytes on links and hidden travel; compares schedules from 8 to 1024 ranks."""
    check_plot(plot)
    if calibrate is not None or emulate is not None:
        return _calibrate(ctx, calibrate, emulate, as_json)
    if check is not None:
        _check_given(ctx, "--check", ("check", "cluster", "values"))
    if trace is not None and _is_given(ctx, "skew"):
        raise ConfigError("--skew is of routing that is drawn: leave it out, --trace says what is chosen")
    if "balanced" not in (placement or ()) and _is_given(ctx, "spare"):
        raise ConfigError("--spare is of balanced placements: add --placement balanced, or leave it out")
    from crossdock.cli.plan_show import show_check, show_comparison
    from crossdock.simulate import Drawn, compare, read_routing
    from crossdock.simulate.check import check as checked

    machines = _cluster(cluster, values or [])
    if check is not None:
        return show_check(checked(_json(check, "--check"), machines), machines, as_json)
    shape = _shape(model)
    routing = Drawn.skewed(shape, skew, seed) if trace is None else read_routing(trace, shape, seed)
    worlds, choice = _integers("--ranks", ranks), _choice(hierarchy, wire, chunks, overlap, placement, spare)
    _check_size(worlds, tokens, shape)
    what = {"model": model, "cluster": machines.to_json(), "tokens_per_rank": tokens}
    what |= {"routing": {"skew": skew, "seed": seed} if trace is None else str(trace)}
    show_comparison(what, compare(shape, machines, routing, tokens, worlds, choice), len(worlds), plot, as_json)


def _check_given(ctx: typer.Context, mode: str, used: tuple[str, ...]) -> None:
    """Raises ConfigError for a parameter that the mode has no use for."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name not in (*used, "as_json") and _is_given(ctx, name):
            called = parameter.opts[0] if parameter.opts[0].startswith("-") else f"the {name}"
            raise ConfigError(f"{called} says nothing to {mode}: leave it out")


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _shape(model: str) -> "LayerShape":
    """By name, or from a folder's config.json."""
    from crossdock.simulate import SHAPES, LayerShape

    if model in SHAPES:
        return SHAPES[model]
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model must be one of {', '.join(SHAPES)} or a folder with a config.json, found {model!r}")
    config = _json(path, "model")
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return LayerShape.from_config(config)


def _cluster(name: str, values: list[str]) -> "Cluster":
    """A preset or a file, with the values of --set in it."""
    from crossdock.simulate import PRESETS, Cluster

    if name in PRESETS:
        found = PRESETS[name]
    elif Path(name).is_file():
        found = Cluster.from_json(_json(Path(name), "--cluster"))
    else:
        raise ConfigError(f"--cluster must be one of {', '.join(PRESETS)} or a file, found {name!r}")
    changes: dict[str, float | bool] = {}
    for text in values:
        key, _, value = text.partition("=")
        try:
            changes[key] = value == "true" if value in ("true", "false") else float(value)
        except ValueError:
            raise ConfigError(f"--set must be NAME=VALUE such as inter.bytes_per_s=90e9, found {text!r}") from None
    return found.changed(changes)


def _json(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {path} cannot be read as JSON: {str(error).splitlines()[0]}") from None


def _choice(hierarchy: Several, wire: Several, chunks: str, overlap: bool, placement: Several, spare: int) -> "Choice":
    from crossdock.simulate import HIERARCHIES, PLACEMENTS, WIRES, Choice

    for option, given, among in (("hierarchy", hierarchy, HIERARCHIES), ("wire", wire, WIRES),
                                 ("placement", placement, PLACEMENTS)):  # fmt: skip
        for value in given or ():
            if value not in among:
                raise ConfigError(f"--{option} must be one of {', '.join(among)}, found {value!r}")
    counts = tuple(_integers("--chunks", chunks))
    names = tuple(hierarchy or ("flat", "node", "ring"))
    return Choice(names, tuple(wire or WIRES), counts, tuple(placement or ("contiguous",)), spare, overlap)


def _integers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ConfigError(f"{option} must be positive integers with commas between, found {text!r}")
    return sorted({int(part) for part in parts})


def _check_size(worlds: list[int], tokens: int, shape: "LayerShape") -> None:
    choices = worlds[-1] * tokens * shape.top_k
    if choices > MOST_CHOICES:
        raise ConfigError(
            f"{worlds[-1]} ranks of {tokens} tokens of {shape.top_k} experts are {choices} choices to count, at most "
            f"{MOST_CHOICES} fit: use fewer --tokens or --ranks"
        )


def _calibrate(ctx: typer.Context, path: Path | None, emulate: str | None, as_json: bool) -> None:
    """Starts the ranks, or is one of them; rank 0 writes the file."""
    if path is None:
        raise ConfigError("--emulate is for --calibrate: predictions take a --cluster")
    _check_given(ctx, "--calibrate", ("calibrate", "emulate"))
    from crossdock.cli.bench.cluster import Link, Shape, run_on_cluster
    from crossdock.cli.launch import rank_command, run_ranks, under_launcher

    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--calibrate {path}: there is no folder {path.absolute().parent}")
    if not ctx.obj.is_rank and (emulate is not None or not under_launcher()):
        command, debug = rank_command(ctx.obj.argv), ctx.obj.debug
        if emulate is None:
            raise typer.Exit(run_ranks(command, 4, debug=debug))
        raise typer.Exit(run_on_cluster(command, Shape.parse(emulate), Link(), debug=debug))
    from crossdock.cli.plan_calibrate import calibrate
    from crossdock.cli.runtime import join_ranks

    with join_ranks("cpu", "auto", 120.0) as runtime:
        measured = calibrate(runtime.transport, one_machine=emulate is not None)
        if runtime.group.rank == 0:
            path.write_text(json.dumps(measured.to_json(), indent=1) + "\n")
            print(f"written: {path}", file=sys.stderr)
            if as_json:
                print(json.dumps(measured.to_json()))
