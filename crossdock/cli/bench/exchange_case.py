"""One case of `bench exchange`: the plain form and ours, exchange alone and whole layer, in turn within one run.

Alone, the exchange has experts that do nothing: what arrives, decoded and by slot, is what returns. So a token's result
is the token times the sum of its weights, and each form is checked by that before its time counts; layers are checked
by what the plain layer gives, token by token.

Legend: T tokens a rank, D hidden, E experts, K experts per token, L slots a rank, F inner size of an expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mode
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.cli.bench.counted import Counted, crossings
from crossdock.cli.bench.flights import Flights, watch_flights
from crossdock.cli.bench.plain_exchange import Trip, plain_combine, plain_dispatch
from crossdock.cli.bench.timing import compare_ranks
from crossdock.cli.launch import cores
from crossdock.comm import DispatchPlan, Inbound, Transport
from crossdock.errors import CrossdockError
from crossdock.moe import ExchangeConfig, MoEConfig, MoELayer
from crossdock.moe.trace import DeviceClock, HostClock, Recorder, Watched
from crossdock.moe.wire import Fp8Wire
from crossdock.parallel import EPGroup, ExpertPlacement
from crossdock.routing import Routing
from crossdock.simulate import rank_choices

EXPERTS, TOP_K = 64, 8
TOLERANCE = {"plain": 0.01, "bf16": 0.01, "fp8": 0.08}  # of the largest value: sums in bfloat16, e4m3 has 3 bits
# Of a token's result as a vector. One wrong expert of eight, whose results are alike in size and otherwise unrelated,
# changes it by about sqrt(2 / 8) = 0.5, and by 0.2 at least in layers as small as 128 by 32; sums in bfloat16 change it
# by at most 0.004 there, and e4m3 rows by 0.04 on average and 0.06 at most.
LAYER_TOLERANCE = {"bf16": 0.01, "fp8": 0.12}


Form = Callable[[Tensor, Routing], Tensor]


@dataclass(frozen=True)
class Case:
    """What is measured."""

    hidden: int
    tokens: int
    routing: str  # "random" or "skewed"

    def __str__(self) -> str:
        return f"D={self.hidden} T={self.tokens} {self.routing}"

    def peak_bytes(self, ranks: int, expert_size: int) -> int:
        """What `ranks` ranks hold at most, about: two layers' experts, and rows of bfloat16 twelve times over.

        Twelve: what the experts alone are measured with; sent, arrived, in order, the experts' results, these in order,
        back; and about as much in holes that other forms' sizes leave in memory that is kept. 23 GB were not enough for
        four ranks with 4096 tokens of 7168 values.
        """
        rows = ranks * self.tokens * TOP_K * self.hidden * 2
        return 12 * rows + 2 * 2 * 3 * EXPERTS * self.hidden * expert_size


@dataclass(frozen=True)
class Found:
    """times: seconds of each form in each round. flights: of a layer's rows, by wire. chunks: how many a layer took in
    most rounds, by the name of its time, and in how many portions the first of them came (`crossdock.comm.legs`).

    crossed, minimum: bytes of rows between nodes in one exchange, there and back, over all ranks, by form; the minimum
    is each (token, node) pair once. metadata: bytes of integers and weights beside them.
    """

    times: dict[str, list[float]]
    flights: dict[str, Flights]
    chunks: dict[str, int]
    portions: dict[str, int]
    crossed: dict[str, int]
    minimum: dict[str, int]
    metadata: dict[str, int]


class _Chosen(nn.Module):
    """Stands where a layer has its router, and gives the same routing at each call."""

    routing: Routing

    def forward(self, x_TD: Tensor, load_E: Tensor, placement_tables: object) -> Routing:
        return self.routing


class Ours:
    """The package's own layer, its rows in bfloat16 or FP8 on the wire, with bytes and waits recorded."""

    def __init__(self, transport: Transport, wire: str, hidden: int, expert_size: int, device: torch.device) -> None:
        world_size = transport.world_size
        self.counted = Counted(transport)
        self.recorder = Recorder(DeviceClock() if device.type == "cuda" else HostClock(), paused=True)  # when timed
        config = MoEConfig(hidden, expert_size, EXPERTS, TOP_K)
        places = (*range(EXPERTS), *[-1] * (-EXPERTS % world_size))
        self.layer = MoELayer(
            config,
            Watched(self.counted, self.recorder),
            ExpertPlacement(EXPERTS, world_size, places),
            exchange=ExchangeConfig("node", "fp8" if wire == "fp8" else "native", chunks=0),
            device=device,
        ).requires_grad_(False)
        self.chosen = _Chosen()
        self.chunks: list[tuple[int, int]] = []  # of each call of `whole`, and portions
        self.layer.router = cast(Any, self.chosen)

    def exchange(self, x_TD: Tensor, routing: Routing) -> Tensor:
        dispatcher = self.layer.dispatcher
        inbound = dispatcher.dispatch(x_TD, dispatcher.plan(routing.expert_ids_TK, routing.weights_TK))
        out_RD = inbound.decoded().in_order().rows_RD
        return dispatcher.combine(out_RD, routing.weights_TK, inbound)

    def whole(self, x_TD: Tensor, routing: Routing) -> Tensor:
        self.chosen.routing = routing
        y_TD: Tensor = self.layer(x_TD)
        pipeline = self.layer.pipeline
        pace = pipeline.pace
        self.chunks.append((pipeline.chunks, 0) if pace is None else (pace.chosen, pace.portions))
        return y_TD


class Contenders:
    """All forms at one hidden size, with the same experts."""

    def __init__(
        self, group: EPGroup, transport: Transport, hidden: int, expert_size: int, ranks_here: int | None = None
    ) -> None:
        """ranks_here: on this machine, whatever nodes they see; all by default."""
        device = group.device
        self.ranks_here = ranks_here or group.world_size
        self.group, self.transport, self.hidden, self.device = group, transport, hidden, device
        self.ours = {wire: Ours(transport, wire, hidden, expert_size, device) for wire in ("bf16", "fp8")}
        layer = self.ours["bf16"].layer
        self.slots_per_rank = layer.placement.slots_per_rank
        torch.manual_seed(transport.rank)
        for weight in layer.experts.parameters():
            weight.normal_(std=hidden**-0.5)
        layer.pack()
        self.experts: Callable[[Inbound], Tensor] = layer.experts
        self.ours["fp8"].layer.experts = layer.experts

    def _plain_dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Trip]:
        assert self.group.process_group is not None
        return plain_dispatch(x_TD, routing.expert_ids_TK, self.slots_per_rank, self.group.process_group)

    def plain_exchange(self, x_TD: Tensor, routing: Routing) -> Tensor:
        rows_RD, trip = self._plain_dispatch(x_TD, routing)
        return plain_combine(rows_RD, routing.weights_TK, trip)

    def plain_layer(self, x_TD: Tensor, routing: Routing) -> Tensor:
        rows_RD, trip = self._plain_dispatch(x_TD, routing)
        out_RD = self.experts(_inbound(rows_RD, trip))
        del rows_RD  # as large as what is to come
        return plain_combine(out_RD, routing.weights_TK, trip)

    def measure(self, case: Case, budget_s: float, rounds: int | None) -> Found:
        """All forms in turn; a collective of all ranks. Raises CrossdockError where one gives wrong results."""
        torch.manual_seed(self.transport.world_size + self.transport.rank)  # its own tokens, unlike any weights
        x_TD = torch.randn(case.tokens, self.hidden, device=self.device).to(torch.bfloat16)
        routing = choose(case, self.transport.rank, self.device)
        exchanges = {"plain": self.plain_exchange} | {wire: ours.exchange for wire, ours in self.ours.items()}
        layers = {"plain layer": self.plain_layer} | {f"{wire} layer": ours.whole for wire, ours in self.ours.items()}
        for ours in self.ours.values():
            ours.counted.crossed.clear()
        for name, form in exchanges.items():
            self._check(name, form(x_TD, routing), x_TD)
        crossed, minimum, metadata = self._bytes(routing)
        expected_TD = self.plain_layer(x_TD, routing)
        for wire, ours in self.ours.items():
            self._check_layer(wire, ours.whole(x_TD, routing), expected_TD)
        del expected_TD
        calls = {name: _bound(form, x_TD, routing) for name, form in (exchanges | layers).items()}
        calls |= self._parts(x_TD, routing)
        times = compare_ranks(calls, self.transport, self.device, budget_s, rounds)
        rounds_taken = len(times["plain"])
        most = {f"{wire} layer": mode(ours.chunks[-rounds_taken:]) for wire, ours in self.ours.items()}
        chunks, portions = ({name: taken[at] for name, taken in most.items()} for at in (0, 1))
        sent_W = torch.bincount(
            (routing.expert_ids_TK // self.slots_per_rank).reshape(-1), minlength=self.group.world_size
        )
        rows = list(map(sum, zip(*self.transport.all_gather(sent_W.tolist(), "bench rows"), strict=True)))
        each = min(cores() / self.ranks_here, torch.get_num_threads()) if self.device.type == "cpu" else None
        flights = {}
        for wire, ours in self.ours.items():
            call, busiest = _bound(ours.whole, x_TD, routing), rows.index(max(rows))
            flights[wire] = watch_flights(call, ours.recorder, self.transport, busiest, each)
        return Found(times, flights, chunks, portions, crossed, minimum, metadata)

    def _bytes(self, routing: Routing) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """(rows that crossed, rows that must, integers that crossed): bytes by form, of one exchange of each."""
        each, once = crossings(routing.expert_ids_TK, self.transport, self.slots_per_rank)
        found = {"each": each, "once": once}
        for wire, ours in self.ours.items():
            found[wire], found[f"{wire} metadata"] = ours.counted.crossed.rows, ours.counted.crossed.metadata
        total = self._total(found)
        back = self.hidden * 2
        crossed = {"plain": total["each"] * 2 * back} | {wire: total[wire] for wire in self.ours}
        there = {"bf16": back, "fp8": Fp8Wire(self.hidden).row_bytes(self.hidden)}
        minimum = {wire: total["once"] * (there[wire] + back) for wire in self.ours}
        return crossed, minimum, {wire: total[f"{wire} metadata"] for wire in self.ours}

    def _parts(self, x_TD: Tensor, routing: Routing) -> dict[str, Callable[[], Any]]:
        """What shows where time goes: the experts alone, and in one node the plain form's rows alone, by either way."""
        rows_RD, trip = self._plain_dispatch(x_TD, routing)
        inbound = _inbound(rows_RD, trip)
        parts: dict[str, Callable[[], Any]] = {"experts": lambda: self.experts(inbound)}
        if self.transport.topology.num_nodes > 1:
            return parts
        sends, receives = trip.send_counts, trip.recv_counts
        rows_SD = x_TD.index_select(0, trip.order_S // TOP_K)

        def by_transport() -> None:
            arrived = self.transport.all_to_all_rows(rows_SD, sends, receives, "dispatch of rows alone").wait()
            self.transport.all_to_all_rows(arrived, receives, sends, "combine of rows alone").wait()

        def by_torch() -> None:
            arrived = torch.empty_like(rows_RD)
            dist.all_to_all_single(arrived, rows_SD, receives, sends, group=trip.group)
            dist.all_to_all_single(torch.empty_like(rows_SD), arrived, sends, receives, group=trip.group)

        return parts | {"rows": by_transport, "plain rows": by_torch}

    def _check(self, name: str, y_TD: Tensor, x_TD: Tensor) -> None:
        """Raises CrossdockError where experts that do nothing changed the tokens: weights add up to one."""
        worst = float((y_TD.float() - x_TD.float()).abs().max() / x_TD.float().abs().max())
        if not worst <= TOLERANCE[name]:
            raise CrossdockError(f"rank {self.transport.rank}: {name}: tokens came back changed by {worst:.3g}")

    def _check_layer(self, wire: str, y_TD: Tensor, expected_TD: Tensor) -> None:
        """Raises CrossdockError naming the token whose result differs most, where that is too much."""
        error_T = (y_TD.float() - expected_TD.float()).norm(dim=1) / expected_TD.float().norm(dim=1)
        worst = int(error_T.argmax())  # NaN counts as the largest
        if not float(error_T[worst]) <= LAYER_TOLERANCE[wire]:
            raise CrossdockError(f"rank {self.transport.rank}: {wire} layer: token {worst} differs from the plain "
                                 f"layer's by {float(error_T[worst]):.3g}")  # fmt: skip

    def _total(self, found: dict[str, int]) -> dict[str, int]:
        """Summed over the ranks."""
        gathered = self.transport.all_gather(list(found.values()), "bench bytes")
        return dict(zip(found, map(sum, zip(*gathered, strict=True)), strict=True))


def choose(case: Case, rank: int, device: torch.device) -> Routing:
    """K distinct experts a token, drawn as predictions draw them (`crossdock.simulate`); equal weights."""
    ids_TK = torch.from_numpy(rank_choices(case.routing, rank, case.tokens, EXPERTS, TOP_K)).to(device)
    return Routing(ids_TK, torch.full(ids_TK.shape, 1.0 / TOP_K, device=device), ids_TK)


def _inbound(rows_RD: Tensor, trip: Trip) -> Inbound:
    return Inbound(rows_RD, trip.ends_L, cast(DispatchPlan, None))  # experts ask for rows and ends only


def _bound(form: Form, x_TD: Tensor, routing: Routing) -> Callable[[], Tensor]:
    return lambda: form(x_TD, routing)
