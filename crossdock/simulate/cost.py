"""What a stage costs: rows and bytes in, seconds of each resource out; and the load it puts on each link.

A stage lasts as long as its busiest rank, port or link: an all-to-all needs rows of every rank, so no rank gets far
ahead of another. Ranks that share a processor add up on its cores, but no rank uses more than one.

Legend: W ranks, N nodes, I links between nodes (one a rank, or one a node where ranks share it), Q processors.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock.simulate.cluster import Cluster
from crossdock.simulate.shape import LayerShape
from crossdock.simulate.traffic import Counts, Traffic

Seconds = NDArray[np.floating[Any]]

COMPUTE, OUTER, INNER = "compute", "outer", "inner"
EXCHANGES = frozenset({OUTER, INNER})


@dataclass(frozen=True)
class Load:
    """Bytes of one exchange by instance: what each rank copies to itself, and what each port and link sends, receives.

    Ports are a rank's way to the others of its node, links a rank's or a node's way to other nodes.
    """

    local_W: Counts
    intra_2W: Counts
    inter_2I: Counts

    def __add__(self, other: "Load") -> "Load":
        return Load(self.local_W + other.local_W, self.intra_2W + other.intra_2W, self.inter_2I + other.inter_2I)


@dataclass(frozen=True)
class Stage:
    """`needs`: seconds of each resource at its busiest; `delay`: seconds in which nothing is needed.

    `until` is the step that waits for it, of those that stages.py lists; nothing waits for work of the processors, as
    what follows it in its lane comes after it anyway.
    """

    name: str
    lane: str
    phase: str
    needs: dict[str, float]
    delay: float = 0.0
    until: str = ""
    load: Load | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Costs:
    """Makes the stages of one cluster and one layer."""

    cluster: Cluster
    shape: LayerShape

    def work(self, name: str, phase: str, seconds_W: Seconds, delay: float = 0.0) -> Stage:
        """A stage of the processors alone, from what it takes each rank on one core."""
        processor = self.cluster.processor
        pools = -(-len(seconds_W) // processor.ranks)
        padded_W = np.zeros(pools * processor.ranks)
        padded_W[: len(seconds_W)] = seconds_W
        seconds_QR = padded_W.reshape(pools, processor.ranks)
        busiest = np.maximum(seconds_QR.sum(1) / processor.cores, seconds_QR.max(1)).max()
        return Stage(name, COMPUTE, phase, {"processor": float(busiest)}, delay)

    def exchange(self, name: str, lane: str, phase: str, until: str, bytes_WW: Counts) -> Stage:
        """An all-to-all; bytes_WW[a, b] go from a to b."""
        nodes = len(bytes_WW) // min(self.cluster.ranks_per_node, len(bytes_WW))
        node_W = np.arange(len(bytes_WW)) * nodes // len(bytes_WW)
        near_WW = np.where(node_W[:, None] == node_W[None, :], bytes_WW, 0)
        local_W = np.diagonal(bytes_WW)
        intra_2W = np.stack([near_WW.sum(1), near_WW.sum(0)]) - local_W
        inter_2W = np.stack([bytes_WW.sum(1), bytes_WW.sum(0)]) - intra_2W - local_W
        load = Load(local_W, intra_2W, self._links(inter_2W, nodes))
        latency = (self.cluster.inter if lane == OUTER and nodes > 1 else self.cluster.intra).latency_s
        return self._travel(name, lane, phase, until, load, bytes_WW.sum(1) - local_W, latency)

    def ring(self, name: str, phase: str, until: str, bytes_NM: Counts) -> Stage:
        """Bytes from each node's ranks to the next node's; all links work at once, every hop has its latency."""
        sent_W, received_W = bytes_NM.reshape(-1), np.roll(bytes_NM, 1, axis=0).reshape(-1)
        nodes, nothing_W = len(bytes_NM), np.zeros_like(sent_W)
        links = self._links(np.stack([sent_W, received_W]), nodes)
        load = Load(nothing_W, np.stack([nothing_W, nothing_W]), links)
        latency = max(1, nodes - 1) * self.cluster.inter.latency_s
        return self._travel(name, OUTER, phase, until, load, sent_W, latency)

    def _links(self, inter_2W: Counts, nodes: int) -> Counts:
        return inter_2W.reshape(2, nodes, -1).sum(2) if self.cluster.inter.shared else inter_2W

    def _travel(
        self, name: str, lane: str, phase: str, until: str, load: Load, sent_W: Counts, latency_s: float
    ) -> Stage:
        cluster, processor = self.cluster, self.cluster.processor
        worked_W = load.local_W / processor.local + sent_W / processor.wire
        copies = self.work(name, phase, worked_W + (0.0 if processor.host else processor.call_s))
        needs = copies.needs | {
            "intra": float(load.intra_2W.max(initial=0)) / cluster.intra.bytes_per_s,
            "inter": float(load.inter_2I.max(initial=0)) / cluster.inter.bytes_per_s,
        }
        return Stage(name, lane, phase, needs, latency_s + (processor.call_s if processor.host else 0.0), until, load)

    def planning(self, name: str, choices_W: Counts) -> Stage:
        """(token, k) choices put in order."""
        processor = self.cluster.processor
        stage = self.work(name, "plan", choices_W / processor.plan)
        return replace(stage, needs={"host": stage.needs["processor"]}) if processor.host else stage

    def gathering(self, traffic: Traffic) -> Stage:
        """Counts gathered from all ranks: a few integers, for which the host waits."""
        cluster, processor = self.cluster, self.cluster.processor
        latencies = cluster.intra.latency_s, cluster.inter.latency_s if traffic.nodes > 1 else 0.0
        if processor.host:
            return Stage("counts", COMPUTE, "plan", {}, max(latencies) + processor.call_s)
        return self.work("counts", "plan", np.full(traffic.ranks, processor.call_s), max(latencies))

    def gather(self, rows_W: Counts, row_bytes: int) -> Seconds:
        """Seconds for rows written by an index."""
        return rows_W * (row_bytes / self.cluster.processor.gather)

    def reduce(self, terms_W: Counts) -> Seconds:
        """Seconds for rows that a weighted sum reads."""
        return terms_W * (self.shape.native_row / self.cluster.processor.reduce)

    def encode(self, rows_W: Counts) -> Seconds:
        return rows_W * (self.shape.native_row / self.cluster.processor.encode)

    def decode(self, rows_W: Counts) -> Seconds:
        return rows_W * (self.shape.native_row / self.cluster.processor.decode)

    def products(self, traffic: Traffic, rows_W: Counts, share: float = 1.0) -> Stage:
        """Routed experts of `rows_W` of the rows each rank has, by the slower of two bounds: operations, and weights of
        the slots that have rows. `share` of these slots, with that share of the rows."""
        shape, processor = self.shape, self.cluster.processor
        used_W = np.minimum((traffic.rows_P.reshape(traffic.ranks, -1) > 0).sum(1), rows_W)
        operations_W = rows_W * shape.expert_flops / self._matmul
        weights_W = used_W * shape.expert_bytes / processor.weights
        return self.work("experts", "experts", share * np.maximum(operations_W, weights_W))

    def shared(self, traffic: Traffic) -> Stage:
        """Shared experts of the tokens' own ranks, while rows are under way."""
        operations_W = traffic.tokens_W * (6.0 * self.shape.hidden * self.shape.shared)
        return self.work("shared experts", "experts", operations_W / self._matmul)

    @property
    def _matmul(self) -> float:
        processor = self.cluster.processor
        return processor.matmul_fp8 if self.shape.fp8_experts else processor.matmul
