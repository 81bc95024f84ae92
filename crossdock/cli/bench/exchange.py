"""`bench exchange`: dispatch and combine over several ranks against a plain all_to_all_single of the same bytes.

`exchange_speedup_bf16` is plain / ours. What this form of the exchange has no means to measure (an FP8 wire, an
overlapped layer) is null.

Legend: T tokens a rank, D hidden, E experts, K experts per token, P slots, L slots a rank, S rows sent.
"""

from typing import Annotated, Any

import typer

from crossdock.cli.bench.report import AsJson, Device, Plot, check_plot, deliver, progress
from crossdock.cli.launch import rank_command, run_ranks, under_launcher

EXPERTS, TOP_K = 64, 8
CASES = [
    (hidden, tokens, routing) for hidden in (1024, 4096) for tokens in (8, 256) for routing in ("random", "skewed")
]
ROUNDS = 15


def exchange(
    ctx: typer.Context,
    ranks: Annotated[int | None, typer.Option(min=2, help="Ranks to start on this machine; 4 by default.")] = None,
    device: Device = None,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in seconds.")] = 60.0,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Dispatch and combine over several ranks, beside a plain all-to-all of the same bytes."""
    check_plot(plot)
    if not ctx.obj.is_rank and (ranks is not None or not under_launcher()):
        raise typer.Exit(run_ranks(rank_command(ctx.obj.argv), ranks or 4, debug=ctx.obj.debug))
    from crossdock.cli.runtime import join_ranks

    with join_ranks(device, "auto", timeout) as runtime:
        cases = [_case(runtime, *case) for case in progress(CASES, "exchange")]
        nodes = runtime.group.topology.num_nodes
        if runtime.group.rank == 0:
            result = {"world": f"{nodes}x{runtime.group.world_size // nodes}", "transport": runtime.transport.name}
            deliver(result | {"device": str(runtime.group.device), "cases": cases}, "exchange", as_json, plot)


def _case(runtime: Any, hidden: int, tokens: int, routing: str) -> dict[str, Any]:
    """One line of the result; a collective of all ranks."""
    import torch

    from crossdock.comm import Dispatcher

    group, transport = runtime.group, runtime.transport
    torch.manual_seed(group.rank)
    x_TD = torch.randn(tokens, hidden, device=group.device).to(torch.bfloat16)
    slots = -(-EXPERTS // group.world_size) * group.world_size
    slot_ids_TK = _choose(tokens, routing).to(group.device)
    weights_TK = torch.full(slot_ids_TK.shape, 1.0 / TOP_K, device=group.device)
    dispatcher = Dispatcher(transport, slots, hidden, torch.bfloat16)
    plan = dispatcher.plan(slot_ids_TK)

    def ours() -> None:
        inbound = dispatcher.dispatch(x_TD, dispatcher.plan(slot_ids_TK))
        dispatcher.combine(inbound.rows_RD, weights_TK, inbound)

    sent_SD = x_TD.new_zeros(sum(plan.send_counts), hidden)
    arrived_RD = x_TD.new_zeros(sum(plan.recv_counts), hidden)

    def plain() -> None:
        torch.distributed.all_to_all_single(arrived_RD, sent_SD, plan.recv_counts, plan.send_counts)
        torch.distributed.all_to_all_single(sent_SD, arrived_RD, plan.send_counts, plan.recv_counts)

    with torch.no_grad():
        took_us, plain_us = _in_turn(runtime, [ours, plain])
    actual, least = _internode_bytes(runtime, slot_ids_TK, slots // group.world_size, hidden * 2)
    return {
        "case": f"D={hidden} T={tokens} {routing}",
        "hidden": hidden,
        "tokens_per_rank": tokens,
        "routing": routing,
        "us": took_us,
        "plain_us": plain_us,
        "ratio": {"all_to_all_single": plain_us / took_us},
        "speedup_fp8": None,
        "speedup_bf16": None,
        "exchange_speedup_fp8": None,
        "exchange_speedup_bf16": plain_us / took_us,
        "internode_bytes": actual,
        "internode_bytes_minimum": least,
        "hidden_fraction": None,
    }


def _choose(tokens: int, routing: str) -> Any:
    """K distinct experts a token: all equally likely, or expert e with a weight of 1 / (e + 1)."""
    import torch

    weight_E = torch.ones(EXPERTS) if routing == "random" else 1.0 / torch.arange(1, EXPERTS + 1)
    return torch.multinomial(weight_E.expand(tokens, EXPERTS), TOP_K)


def _in_turn(runtime: Any, calls: list[Any]) -> list[float]:
    """Median microseconds of each call, from a common start until the last rank is through; in turn."""
    import time
    from statistics import median

    from crossdock.cli.bench.timing import synchronize

    times: list[list[float]] = [[] for _ in calls]
    for turn in range(ROUNDS + 2):
        for call, own in zip(calls, times, strict=True):
            runtime.transport.all_gather([0], "bench start")
            began = time.perf_counter()
            call()
            synchronize(runtime.group.device)
            took = round((time.perf_counter() - began) * 1e9)
            slowest = max(values[0] for values in runtime.transport.all_gather([took], "bench end"))
            if turn >= 2:  # the first two warm up
                own.append(slowest / 1e3)
    return [median(own) for own in times]


def _internode_bytes(runtime: Any, slot_ids_TK: Any, slots_per_rank: int, row_bytes: int) -> tuple[int, int]:
    """(bytes that cross between nodes in one dispatch, bytes if each token crossed to a node once), over all ranks."""
    node_of_rank, own = runtime.group.topology.node_of_rank, runtime.group.topology.node_of_rank[runtime.group.rank]
    crossings = [[node_of_rank[slot // slots_per_rank] for slot in slots] for slots in slot_ids_TK.tolist()]
    rows = sum(node != own for nodes in crossings for node in nodes)
    distinct = sum(node != own for nodes in crossings for node in set(nodes))
    totals = runtime.transport.all_gather([rows, distinct], "bench bytes")
    return row_bytes * sum(r for r, _ in totals), row_bytes * sum(d for _, d in totals)
