"""What `crossdock plan` prints and draws: the comparison with its reasons, and predictions beside measurements."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdock.errors import ConfigError

if TYPE_CHECKING:
    from crossdock.simulate import Cluster, Prediction
    from crossdock.simulate.check import Checked

SHOWN = 6  # schedules of each number of ranks


def show_comparison(
    what: dict[str, Any],
    compared: "Iterable[list[Prediction]]",
    count: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """`compared` gives each of `count` numbers of ranks, its schedules fastest first; shown as they come."""
    from rich.console import Console
    from rich.progress import track

    from crossdock.simulate import explain

    progress = Console(stderr=True)
    hidden = not progress.is_terminal
    found = list(track(compared, "predicting", count, console=progress, transient=True, disable=hidden))
    if plot is not None:
        _draw(found, f"{what['model']}, {what['tokens_per_rank']} tokens a rank, {what['cluster']['name']}", plot)
        print(f"drawn: {plot}", file=sys.stderr)
    if as_json:
        cases = [case_json(one) for each in found for one in each]
        best = {str(each[0].ranks): str(each[0].schedule) for each in found}
        print(json.dumps(what | {"best": best, "why": [explain(each) for each in found], "cases": cases}), flush=True)
        return
    console = _console()
    console.print(_table(found, str(what["cluster"]["name"])))
    for each in found:
        for line in explain(each):
            console.print(line, highlight=False, soft_wrap=True)
    for source in what["cluster"]["sources"]:
        console.print(f"[dim]{source}[/dim]", highlight=False, soft_wrap=True)


def case_json(one: "Prediction") -> dict[str, Any]:
    """One prediction as it is printed; times in microseconds."""
    schedule = one.schedule
    names = ("hierarchy", "wire", "chunks", "amid", "overlap", "placement")
    return {
        "case": f"{one.ranks} ranks, {schedule}",
        "ranks": one.ranks,
        "nodes": one.nodes,
        **{name: getattr(schedule, name) for name in names},
        "us": one.total_s * 1e6,
        "phases_us": {name: seconds * 1e6 for name, seconds in one.phase_s.items()},
        "hidden_fraction": one.hidden,
        "bound": one.bound,
        "needs_us": {name: seconds * 1e6 for name, seconds in one.needs_s.items()},
        "critical_path_us": {name: seconds * 1e6 for name, seconds in one.critical.items()},
        "bytes": {kind: {"max": on.max, "mean": on.mean, "total": on.total} for kind, on in one.bytes.items()},
    }


def show_check(checked: "Sequence[Checked]", cluster: "Cluster", as_json: bool) -> None:
    """Each time beside its prediction, and the median of the errors."""
    from crossdock.simulate.check import median_error

    rows = [
        {
            "case": one.case,
            "form": one.form,
            "chunks": one.predicted.schedule.chunks,
            "amid": one.predicted.schedule.amid,
            "measured_us": one.measured_s * 1e6,
            "predicted_us": one.predicted.total_s * 1e6,
            "error": one.error,
            "bound": one.predicted.bound,
            "measured_hidden": one.hidden,
            "predicted_hidden": None if one.hidden is None else one.predicted.hidden,
            "same_rows": one.same_rows,
        }
        for one in checked
    ]
    error = median_error(checked)
    if as_json:
        print(json.dumps({"median_error": error, "cluster": cluster.to_json(), "cases": rows}), flush=True)
        return
    from rich.table import Table

    console, table = _console(), Table(*(name.replace("_", " ") for name in rows[0]), title="predicted and measured")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    console.print(table)
    others = sum(row["same_rows"] is False for row in rows)
    if others:
        console.print(f"{others} of these times are of other rows than were predicted", highlight=False)
    console.print(f"median error {error:.1%} of {len(rows)} times", highlight=False)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "error":
        return f"{value:+.1%}"
    if name.endswith("hidden"):
        return f"{value:.0%}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a log has no width to keep to
        console.width = 200
    return console


def _table(found: "Sequence[Sequence[Prediction]]", name: str) -> Any:
    from rich.table import Table

    heads = ("ranks", "schedule", "us", "plan", "dispatch", "experts", "combine", "hidden", "bound by",
             "self MB", "intra MB", "inter MB", "inter mean")  # fmt: skip
    table = Table(*heads, title=f"a layer on {name}: microseconds, and MB on the busiest link")
    for each in found:
        for place, one in enumerate(each[:SHOWN]):
            phases = [f"{seconds * 1e6:.0f}" for seconds in one.phase_s.values()]
            loads = [f"{one.bytes[kind].max / 1e6:.1f}" for kind in ("self", "intra", "inter")]
            hidden = "" if one.hidden is None else f"{one.hidden:.0%}"
            cells = [str(one.ranks) if not place else "", str(one.schedule), f"{one.total_s * 1e6:.0f}", *phases]
            table.add_row(*cells, hidden, one.bound, *loads, f"{one.bytes['inter'].mean / 1e6:.1f}")
        table.add_section()
    return table


def _draw(found: "Sequence[Sequence[Prediction]]", title: str, path: Path) -> None:
    """Time of a layer and bytes between nodes over the number of ranks, a line for each kind of schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, loads) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    forms = list(dict.fromkeys(_form(one) for each in found for one in each))
    for kind in dict.fromkeys(_kind(one) for each in found for one in each):
        form, _, balanced = kind.partition(", ")
        looks = {"color": f"C{forms.index(form)}", "marker": "o", "linestyle": "--" if balanced else "-"}
        best = [next((one for one in each if _kind(one) == kind), None) for each in found]  # its fastest
        known = [one for one in best if one is not None]
        beyond = [one for one in known if one.bytes["inter"].max]
        times.plot([one.ranks for one in known], [one.total_s * 1e3 for one in known], label=kind, **looks)
        loads.plot([one.ranks for one in beyond], [one.bytes["inter"].max / 1e6 for one in beyond], **looks)
    for axes, what in ((times, "milliseconds a layer"), (loads, "MB on the busiest link between nodes")):
        axes.set_xscale("log", base=2)
        axes.set_xticks([each[0].ranks for each in found], [str(each[0].ranks) for each in found])
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.set_ylabel(what)
    figure.legend(loc="outside right upper")
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {str(error).splitlines()[0]}") from None


def _kind(one: "Prediction") -> str:
    """A schedule but for its chunks."""
    return _form(one) + (", balanced" if one.schedule.placement == "balanced" else "")


def _form(one: "Prediction") -> str:
    return f"{one.schedule.hierarchy} {one.schedule.wire}"
