"""`crossdock plan --calibrate FILE`: rates of these ranks' links and processors, each measured by itself.

What a prediction rests on must not come from what it predicts: here rows are planned, copied, converted, summed, sent
and multiplied one operation at a time, all ranks at once as in a layer. No exchange of a layer is timed.

Legend: T tokens, D hidden, K experts per token, S rows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from crossdock.cli.bench.timing import compare_ranks
from crossdock.cli.launch import cores as usable_cores
from crossdock.comm import Inbound, Transport
from crossdock.comm.combine_kernel import weighted_sum_ref
from crossdock.comm.plan import plan_once, plan_outgoing
from crossdock.errors import ConfigError
from crossdock.moe import MoEConfig
from crossdock.moe.experts import Experts
from crossdock.moe.wire import Fp8Wire
from crossdock.simulate import Cluster, Link, Processor, rank_choices

TOP_K, EXPERTS = 8, 64

Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """What is measured: tokens of D values, experts of F, and how often."""

    hidden: int = 4096
    tokens: int = 1024
    expert: int = 256
    rounds: int = 5
    pings: int = 31

    @property
    def rows(self) -> int:
        """S, one for each (token, k)."""
        return self.tokens * TOP_K

    @property
    def bytes(self) -> int:
        """Of those rows in bfloat16."""
        return 2 * self.rows * self.hidden


USUAL = Size()


def calibrate(transport: Transport, one_machine: bool, size: Size = USUAL) -> Cluster:
    """A collective of all ranks. `one_machine`: they share its cores, and a node's ranks share its way out.

    Raises ConfigError for more ranks than experts.
    """
    topology = transport.topology
    nodes, world = topology.num_nodes, transport.world_size
    if world > EXPERTS:
        raise ConfigError(f"--calibrate divides {EXPERTS} experts over the ranks: at most {EXPERTS}, found {world}")
    per_node = world // nodes
    sharing = world if one_machine else per_node
    cores = min(usable_cores(), sharing)
    bench = _Bench(size, transport, transport.split([topology.ranks_of_node(node) for node in range(nodes)]))
    with torch.inference_mode():
        took = bench.seconds(bench.work() | bench.transfers(), size.rounds)
        took |= bench.seconds(bench.crossing(), 2 * size.rounds, of=min)
        pinged = bench.seconds(bench.pings(), size.pings)
        call_s = bench.processor_s(bench.pings()["inside"], size.pings)
    amounts = bench.amounts()
    rates = {name: sharing * amount / cores / took[name] for name, amount in amounts.items() if name in took}
    wire = rates.pop("inside", rates["local"])
    pair = size.bytes / took["pair"] if "pair" in took else rates["local"]
    processor = Processor(sharing, cores, wire=wire, matmul_fp8=rates["matmul"], call_s=call_s, host=False, **rates)
    latency = {name: max(0.0, took_s - call_s * sharing / cores) for name, took_s in pinged.items()}
    intra = inter = Link(pair, latency["inside"])
    if nodes > 1:
        out = size.bytes * (per_node if one_machine else 1)
        inter = Link(out / took["between"], latency["all"], shared=one_machine)
    measured = (
        f"measured on {nodes}x{per_node} ranks, {sharing} of them on {cores} cores, transport {transport.name}: rows "
        f"of {size.hidden} bfloat16, experts of {size.expert}"
    )
    return Cluster(f"measured-{nodes}x{per_node}", per_node, intra, inter, processor, (measured,))


@dataclass(frozen=True)
class _Bench:
    """Operations for all ranks at once; `node` is the transport of this rank's node."""

    size: Size
    transport: Transport
    node: Transport

    def seconds(
        self, calls: dict[str, Call], rounds: int, of: Callable[[list[float]], float] = median
    ) -> dict[str, float]:
        """Seconds until the last rank is through, `of` so many rounds."""
        times = compare_ranks(calls, self.transport, torch.device("cpu"), 0.0, rounds)
        return {name: of(own) for name, own in times.items()}

    def processor_s(self, call: Call, rounds: int) -> float:
        """Seconds of one core that a rank's call takes, all its threads together; the mean of the ranks."""
        call()
        began = time.process_time()
        for _ in range(rounds):
            call()
        mine_ns = round((time.process_time() - began) / rounds * 1e9)
        return fmean(of_rank for (of_rank,) in self.transport.all_gather([mine_ns], "calibration")) * 1e-9

    def amounts(self) -> dict[str, float]:
        """What a call does on one rank: bytes of bfloat16 rows, choices, operations, bytes of weights."""
        size, slots = self.size, EXPERTS // self.transport.world_size
        weights = 3 * size.hidden * size.expert
        moved = dict.fromkeys(("gather", "reduce", "encode", "decode", "local", "inside"), float(size.bytes))
        return moved | {"plan": size.rows, "matmul": 2.0 * size.rows * weights, "weights": 2.0 * slots * weights}

    def work(self) -> dict[str, Call]:
        """What the processors do in a layer."""
        torch.manual_seed(self.transport.rank)
        size = self.size
        rows_SD = torch.randn(size.rows, size.hidden).to(torch.bfloat16)
        ids_TK = torch.from_numpy(rank_choices("random", self.transport.rank, size.tokens, EXPERTS, TOP_K))
        weights_2TK = torch.full((2 * size.tokens, TOP_K), 1.0 / TOP_K)
        order_S = torch.randperm(size.rows)
        half_2TK = order_S.view(-1, TOP_K).repeat(2, 1)  # a token's results from two places, as over two nodes
        away_TK = torch.rand(size.tokens, TOP_K) < 0.5
        half_2TK[torch.cat([away_TK, ~away_TK])] = size.rows
        wire = Fp8Wire(size.hidden)
        encoded_SX = wire.encode(rows_SD)
        slots = EXPERTS // self.transport.world_size
        config = MoEConfig(size.hidden, size.expert, EXPERTS, TOP_K)
        plain = Experts(config, slots, torch.bfloat16, torch.device("cpu"))
        for weight in plain.parameters():
            weight.normal_(std=size.hidden**-0.5)
        experts = plain.packed()
        many, few = (_inbound(rows_SD[:count], slots) for count in (size.rows, slots))

        def plan() -> None:
            plan_once(plan_outgoing(ids_TK, EXPERTS), self.transport.world_size)

        return {
            "plan": plan,
            "gather": lambda: rows_SD.index_select(0, order_S),
            "reduce": lambda: weighted_sum_ref(rows_SD, weights_2TK, half_2TK, None),
            "encode": lambda: wire.encode(rows_SD),
            "decode": lambda: wire.decode(encoded_SX, torch.bfloat16),
            "matmul": lambda: experts(many),
            "weights": lambda: experts(few),
        }

    def transfers(self) -> dict[str, Call]:
        """Rows to this rank itself, to the others of its node, and from rank 0 to rank 1 alone."""
        transport, node, rows = self.transport, self.node, self.size.rows
        own = [rows * (peer == transport.rank) for peer in range(transport.world_size)]
        calls = {"local": self._transfer(transport, own)}
        if node.world_size > 1:
            others = [0 if peer == node.rank else rows // (node.world_size - 1) for peer in range(node.world_size)]
            calls["inside"] = self._transfer(node, others)
            first = [rows * (node.rank == 0 and node.members[0] == 0 and peer == 1) for peer in range(node.world_size)]
            second = [rows * (node.rank == 1 and node.members[0] == 0 and peer == 0) for peer in range(node.world_size)]
            calls["pair"] = self._transfer(node, first, second)
        return calls

    def crossing(self) -> dict[str, Call]:
        """Rows to other nodes, where there are any.

        The fastest round tells a link's rate: where ranks share one, their connections get in one another's way in
        about half of all rounds, which then take up to twice as long, and a median is now one and now the other.
        """
        transport, node, topology = self.transport, self.node, self.transport.topology
        mine, away = topology.node_of_rank[transport.rank], [0] * transport.world_size
        for other in range(topology.num_nodes):
            if other != mine:
                away[topology.ranks_of_node(other)[node.rank]] = self.size.rows // (topology.num_nodes - 1)
        return {"between": self._transfer(transport, away)} if topology.num_nodes > 1 else {}

    def pings(self) -> dict[str, Call]:
        """One row of one value to everybody, in the node and in all."""
        ways = {"inside": self.node, "all": self.transport}
        return {name: self._transfer(way, [1] * way.world_size, width=1) for name, way in ways.items()}

    def _transfer(
        self, transport: Transport, sends: list[int], receives: list[int] | None = None, width: int | None = None
    ) -> Call:
        """An exchange in which a rank receives from each as many rows as it sends there, or `receives`."""
        rows_SD = torch.ones(sum(sends), width or self.size.hidden, dtype=torch.bfloat16)
        expected = sends if receives is None else receives
        return lambda: transport.all_to_all_rows(rows_SD, sends, expected, "calibration").wait()


def _inbound(rows_RD: Tensor, slots: int) -> Inbound:
    """As many rows for every slot."""
    ends_L = torch.arange(1, slots + 1, dtype=torch.int32) * (len(rows_RD) // slots)
    return Inbound(rows_RD, ends_L, None)  # type: ignore[arg-type]  # a plan is for combine
