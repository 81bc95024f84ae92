"""`bench exchange`: dispatch and combine over several ranks, alone and as a whole layer, beside the plain form.

The plain form is a row for each (token, k) by `all_to_all_single` in bfloat16 (plain_exchange.py). Ours is the
package's layer, over nodes where there are several, its rows in bfloat16 and in FP8 on the wire. All take turns within
one run, each from a common start until the last rank is through; ratios are plain / ours. `--emulate 2x2` runs it on
nodes with slow links between them (cluster.py).

Legend: T tokens a rank, D hidden, F inner size of an expert.
"""

import sys
import time
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.cli.bench.cluster import Link, Shape, run_on_cluster
from crossdock.cli.bench.report import AsJson, Device, Plot, check_plot, deliver
from crossdock.cli.launch import rank_command, run_ranks, under_launcher
from crossdock.errors import ConfigError

if TYPE_CHECKING:
    from crossdock.cli.bench.exchange_case import Case, Found
    from crossdock.cli.runtime import Runtime

ROUTINGS = ("random", "skewed")
EMULATED = (2048, 4096, 7168), (512, 4096)  # hidden sizes and tokens a rank
ONE_MACHINE = (2048, 7168), (8, 512)
BUDGET_S = 30.0  # of a case's rounds, unless six take longer
SHOWN = ("case", "ratio", "rows_speedup", "internode_bytes", "internode_bytes_minimum", "hidden_fraction",
         "hidden_fraction_of_busiest", "hidden_fraction_of_cores", "saved_fraction", "compute_to_communication",
         "compute_to_plain", "us")  # fmt: skip


def exchange(
    ctx: typer.Context,
    ranks: Annotated[int | None, typer.Option(min=2, help="Ranks to start on this machine; 4 by default.")] = None,
    emulate: Annotated[str | None, typer.Option(metavar="NxM", help="N nodes of M ranks, slow links between.")] = None,
    rate_mbit: Annotated[int | None, typer.Option(help="Rate of an emulated node's link; 800 by default.")] = None,
    latency_us: Annotated[int | None, typer.Option(help="Latency added to it (needs the kernel's netem).")] = None,
    hidden: Annotated[list[int] | None, typer.Option(min=1, help="Only this hidden size; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Only so many tokens a rank; repeatable.")] = None,
    routing: Annotated[list[str] | None, typer.Option(help="Only random or only skewed.")] = None,
    expert_size: Annotated[
        int | None, typer.Option(min=1, help="Inner size; by default as products and links ask for.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; as time allows by default, 6 to 200.")] = None,
    device: Device = None,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in seconds.")] = 120.0,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Dispatch, experts and combine over several ranks, beside a plain all-to-all; `--emulate 2x2`: over slow links."""
    check_plot(plot)
    unknown = sorted(set(routing or ()) - set(ROUTINGS))
    if unknown:
        raise ConfigError(f"--routing must be one of {', '.join(ROUTINGS)}, found {unknown[0]!r}")
    if emulate is not None and ranks is not None:
        raise ConfigError("--emulate NxM says how many ranks there are: leave out --ranks")
    if emulate is None and (rate_mbit is not None or latency_us is not None):
        option = "--rate-mbit" if rate_mbit is not None else "--latency-us"
        raise ConfigError(f"{option} is for --emulate: other links are as they are")
    link = Link(
        Link.rate_mbit if rate_mbit is None else rate_mbit, Link.latency_us if latency_us is None else latency_us
    )
    if not ctx.obj.is_rank and (ranks is not None or emulate is not None or not under_launcher()):
        raise typer.Exit(_start(rank_command(ctx.obj.argv), ranks or 4, emulate, link, ctx.obj.debug))
    from crossdock.cli.runtime import join_ranks

    with join_ranks(device, "auto", timeout) as runtime:
        if runtime.transport.name != "torch":
            found = f"found {runtime.group.world_size} of them on transport {runtime.transport.name!r}"
            raise ConfigError(f"bench exchange compares ranks that torchrun or this command itself started; {found}")
        default = EMULATED if runtime.group.topology.num_nodes > 1 else ONE_MACHINE
        chosen = list(product(hidden or default[0], tokens or default[1], routing or ROUTINGS))
        result = _measure(runtime, chosen, expert_size, rounds, shares_memory=emulate is not None)
        if emulate is not None:
            result = {"emulated_link": {"rate_mbit": link.rate_mbit, "latency_us": link.latency_us}} | result
        if runtime.group.rank == 0:
            if not as_json:
                result["cases"] = [{name: case.get(name) for name in SHOWN} for case in result["cases"]]
            deliver(result, "exchange", as_json, plot)


def _start(command: list[str], ranks: int, emulate: str | None, link: Link, debug: bool) -> int:
    """The exit code of the command's ranks."""
    if emulate is None:
        return run_ranks(command, ranks, debug=debug)
    return run_on_cluster(command, Shape.parse(emulate), link, debug=debug)


def _measure(
    runtime: "Runtime",
    chosen: list[tuple[int, int, str]],
    expert_size: int | None,
    rounds: int | None,
    shares_memory: bool,
) -> dict[str, Any]:
    """The result; a collective of all ranks. `shares_memory`: all of them run on one machine, whatever nodes they see.

    Raises ConfigError where no case fits into memory.
    """
    import torch

    from crossdock.cli.bench.exchange_case import EXPERTS, TOP_K, Case, Contenders
    from crossdock.cli.bench.expert_size import measured_size
    from crossdock.cli.bench.links import measure_links
    from crossdock.memory import free_bytes, return_freed_memory

    began, group, transport = time.perf_counter(), runtime.group, runtime.transport
    topology = group.topology
    here = group.world_size if shares_memory else len(topology.ranks_of_node(topology.node_of_rank[group.rank]))
    with torch.inference_mode():
        links = measure_links(transport) if group.device.type == "cpu" else None
        expert_size, why = measured_size(transport, links) if expert_size is None else (expert_size, "asked for")
        _tell(runtime, f"experts of {expert_size}: {why}")
        return_freed_memory()
        cases, left_out = _fitting(runtime, [Case(*case) for case in chosen], here, expert_size, free_bytes())
        rows = []
        for hidden in dict.fromkeys(case.hidden for case in cases):
            contenders = Contenders(group, transport, hidden, expert_size, here)
            for case in cases:
                if case.hidden == hidden:
                    rows.append(_row(case, contenders.measure(case, BUDGET_S, rounds)))
                    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in rows[-1]["ratio"].items())
                    _tell(runtime, f"{len(rows)}/{len(cases)}  {case}: {ratios}")
                    return_freed_memory()  # which the next case needs in other sizes
            del contenders
    nodes = topology.num_nodes
    result = {"world": f"{nodes}x{group.world_size // nodes}", "transport": transport.name, "device": str(group.device)}
    extra: dict[str, Any] = {"links": links} if links else {}
    extra |= {"left_out": left_out} if left_out else {}
    layer = {"expert_size": expert_size, "expert_size_why": why, "num_experts": EXPERTS, "top_k": TOP_K}
    return result | extra | layer | {"seconds": time.perf_counter() - began, "cases": rows}


def _fitting(
    runtime: "Runtime", cases: list["Case"], ranks: int, expert_size: int, free_bytes: int
) -> tuple[list["Case"], dict[str, str]]:
    """(cases for whose peak this machine has memory, why not the others); the same on all ranks."""
    free = min(values[0] for values in runtime.transport.all_gather([free_bytes], "bench memory"))
    needed = {case: case.peak_bytes(ranks, expert_size) for case in cases}
    if runtime.group.device.type != "cpu":
        return cases, {}
    left_out = {
        str(case): f"needs about {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        for case, size in needed.items()
        if size > free
    }
    if len(left_out) == len(cases):
        raise ConfigError(f"no case fits into memory: {'; '.join(f'{case} {why}' for case, why in left_out.items())}")
    return [case for case in cases if str(case) not in left_out], left_out


def _row(case: "Case", found: "Found") -> dict[str, Any]:
    """One line of the result."""
    from crossdock.cli.bench.exchange_case import TOP_K

    took = {name: median(times) for name, times in found.times.items()}
    row: dict[str, Any] = {"case": str(case), "hidden": case.hidden, "tokens_per_rank": case.tokens}
    row |= {"routing": case.routing, "rounds": len(found.times["plain"])}
    for wire in ("bf16", "fp8"):
        row[f"exchange_speedup_{wire}"] = took["plain"] / took[wire]
        row[f"speedup_{wire}"] = took["plain layer"] / took[f"{wire} layer"]
    for wire, name in (("bf16", ""), ("fp8", "_fp8")):
        row[f"internode_bytes{name}"] = found.crossed[wire]
        row[f"internode_bytes_minimum{name}"] = found.minimum[wire]
        row[f"internode_metadata_bytes{name}"] = found.metadata[wire]
        flights = found.flights[wire]
        row[f"hidden_fraction{name}"] = flights.hidden
        row[f"hidden_fraction_of_busiest{name}"] = flights.hidden_of_busiest
        row[f"hidden_fraction_of_cores{name}"] = flights.hidden_of_cores
        row[f"arrivals_seen_at_the_wait_only{name}"] = flights.unseen
        row[f"busy_cores{name}"] = flights.busy
        # of the exchange's time, what the layer does not take beyond the time of its products
        row[f"saved_fraction{name}"] = (took[wire] + took["experts"] - took[f"{wire} layer"]) / took[wire]
    row["chunks"], row["portions"] = found.chunks, found.portions
    row["internode_bytes_plain"] = found.crossed["plain"]
    row["compute_to_communication"] = took["experts"] / took["bf16"]
    row["compute_to_plain"] = took["experts"] / took["plain"]
    if "rows" in took:
        both = zip(found.times["plain rows"], found.times["rows"], strict=True)  # few rows: two speeds, by round
        row |= {"rows_speedup": median(plain / ours for plain, ours in both)}
        row |= {"ordering_us": (took["bf16"] - took["rows"]) * 1e6}
    delivered = 2 * 2 * case.tokens * TOP_K * case.hidden  # bytes of bfloat16 rows to experts and back, a rank
    row |= {"us": took["bf16"] * 1e6, "gbytes_per_s": delivered / took["bf16"] / 1e9}
    row["times_us"] = {name: seconds * 1e6 for name, seconds in took.items()}
    ratios = {f"exchange {wire}": row[f"exchange_speedup_{wire}"] for wire in ("bf16", "fp8")}
    return row | {"ratio": ratios | {f"layer {wire}": row[f"speedup_{wire}"] for wire in ("bf16", "fp8")}}


def _tell(runtime: "Runtime", line: str) -> None:
    """On stderr, by rank 0, as a run takes minutes."""
    if runtime.group.rank == 0:
        print(line, file=sys.stderr, flush=True)
