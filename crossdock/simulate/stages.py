"""The stages of one chunk of tokens, as `comm` does them: where rows are gathered, sent, put in order and summed.

A form gives the stages between which other chunks' work can run, so that schedule.py can put several chunks in the
order of `crossdock.moe.pipeline`:

    choose      choices are put in order; then the counts of all chunks are gathered at once
    plan        it is found what crosses to other nodes; the slots and weights of that leave, of all chunks at once
    plan_own    what stays is put in order
    plan_far    and what came over; then it leaves, of all chunks at once, which row stands where
    send        rows leave; those that go over rails leave first
    place       rows of a node's own tokens are put in order by slot (and decoded)
    pass_on     rows that came over a rail go on inside the node
    arrive      all others are put in order
    products    the experts
    give_back   results leave for where their rows came from
    pass_back   results of other nodes' tokens are summed and go back over the rail
    finish      results are summed at home

Legend: T tokens, K experts per token, W ranks, N nodes, M ranks a node, U rows as they arrive, R rows by slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdock.simulate.cost import INNER, OUTER, Costs, Stage
from crossdock.simulate.traffic import Counts, Traffic

INDEX_BYTES = 4  # of the integer that says which row stands in a place, and of a slot's id and a weight on a rail
WORTH_BYTES = 1 << 18  # that must be saved a rank, for a token to travel once for several experts: `comm.once`

Stages = list[Stage]


@dataclass(frozen=True)
class FlatStages:
    """Rows straight to the ranks that hold the experts."""

    costs: Costs
    traffic: Traffic
    fp8: bool = False
    is_plain: bool = False

    @property
    def _row(self) -> int:
        shape = self.costs.shape
        return shape.fp8_row if self.fp8 else shape.native_row

    @property
    def _is_once(self) -> bool:
        traffic = self.traffic
        return not self.is_plain and worth_once(traffic.flat_WW, traffic.once_WW, self._row)

    def choose(self) -> Stages:
        return [self.costs.planning("plan", self.traffic.tokens_W * self.traffic.top_k)]

    def plan(self) -> Stages:
        return []

    def plan_own(self) -> Stages:
        return []

    def plan_far(self) -> Stages:
        return []

    def index(self) -> Counts:
        """Bytes from rank to rank that say which row stands where."""
        return self.traffic.flat_WW * INDEX_BYTES * self._is_once

    def send(self) -> Stages:
        costs, traffic = self.costs, self.traffic
        rows_WW = traffic.once_WW if self._is_once else traffic.flat_WW
        gather_W = costs.gather(rows_WW.sum(1), self._row)
        if self.fp8:
            gather_W = gather_W + costs.encode(traffic.tokens_W)
        return [
            costs.work("gather", "dispatch", gather_W),
            costs.exchange("dispatch", OUTER, "dispatch", "arrive", rows_WW * self._row),
        ]

    def place(self) -> Stages:
        return []

    def pass_on(self) -> Stages:
        return []

    def arrive(self) -> Stages:
        costs, traffic = self.costs, self.traffic
        rows_W = (traffic.once_WW if self._is_once else traffic.flat_WW).sum(0)
        return [arrange(costs, "arrange", rows_W, traffic.rows_W, self.fp8)]

    def products(self) -> Stages:
        return [self.costs.products(self.traffic, self.traffic.rows_W)]

    def give_back(self) -> Stages:
        costs, traffic = self.costs, self.traffic
        native = costs.shape.native_row
        return [
            costs.work("restore", "combine", costs.gather(traffic.rows_W, native)),
            costs.exchange("combine", OUTER, "combine", "finish", traffic.flat_WW.T * native),
        ]

    def pass_back(self) -> Stages:
        return []

    def finish(self) -> Stages:
        return [self.costs.work("sum", "combine", self.costs.reduce(self.traffic.flat_WW.sum(1)))]


@dataclass(frozen=True)
class Inside:
    """What travels inside nodes, from rank to rank: rows as they are sent, a row for each (token, k), and the integers
    that tell which is which where a token is sent once."""

    rows_WW: Counts
    each_WW: Counts
    index_WW: Counts


@dataclass(frozen=True)
class NodeStages:
    """Rows over rails, or around a ring of nodes, and inside nodes."""

    costs: Costs
    traffic: Traffic
    fp8: bool = False
    is_ring: bool = False

    @property
    def _row(self) -> int:
        shape = self.costs.shape
        return shape.fp8_row if self.fp8 else shape.native_row

    def _inside(self, is_far: bool) -> "Inside":
        traffic, size = self.traffic, self.traffic.ranks_per_node
        each_WW, once_WW = (traffic.inside(rows_WW, is_far) for rows_WW in (traffic.flat_WW, traffic.once_WW))
        rows_WW, index_WW = each_WW.copy(), np.zeros_like(each_WW)
        for first in range(0, traffic.ranks, size):  # each node decides for itself
            own = slice(first, first + size), slice(first, first + size)
            if worth_once(each_WW[own], once_WW[own], self._row):
                rows_WW[own], index_WW[own] = once_WW[own], each_WW[own]
        return Inside(rows_WW, each_WW, index_WW)

    @cached_property
    def _near(self) -> "Inside":
        return self._inside(False)

    @cached_property
    def _far(self) -> "Inside":
        return self._inside(True)

    def choose(self) -> Stages:
        return [self.costs.planning("plan", self.traffic.tokens_W * self.traffic.top_k)]

    def plan(self) -> Stages:
        stops = min(self.traffic.nodes, self.traffic.top_k + 1)
        return [self.costs.planning("plan over nodes", self.traffic.tokens_W * stops)]

    def slots(self) -> Counts:
        """Bytes from rank to rank that say what a row that crosses is for, and how it is weighted."""
        return self.traffic.rail_WW * (2 * self.traffic.top_k * INDEX_BYTES)

    def plan_own(self) -> Stages:
        return [self.costs.planning("plan of the node's own", self._near.each_WW.sum(1))]

    def plan_far(self) -> Stages:
        return [self.costs.planning("plan of what comes over", self._far.each_WW.sum(1))]

    def index(self) -> Counts:
        """Bytes from rank to rank that say which row stands where."""
        return (self._near.index_WW + self._far.index_WW) * INDEX_BYTES

    def send(self) -> Stages:
        costs, traffic = self.costs, self.traffic
        rail_WW, near_WW = traffic.rail_WW, self._near.rows_WW
        gather_W = costs.gather(rail_WW.sum(1), self._row)
        if self.fp8:
            gather_W = gather_W + costs.encode(traffic.tokens_W)
        if self.is_ring:
            over = costs.ring("dispatch between nodes", "dispatch", "pass_on", traffic.ring_NM * self._row)
        else:
            over = costs.exchange("dispatch between nodes", OUTER, "dispatch", "pass_on", rail_WW * self._row)
        return [
            costs.work("gather for other nodes", "dispatch", gather_W),
            over,
            costs.work("gather for the node", "dispatch", costs.gather(near_WW.sum(1), self._row)),
            costs.exchange("dispatch inside nodes", INNER, "dispatch", "place", near_WW * self._row),
        ]

    def place(self) -> Stages:
        return [self._arranged("arrange own", self._near)]

    def pass_on(self) -> Stages:
        costs, far_WW = self.costs, self._far.rows_WW
        return [
            costs.work("gather what came over", "dispatch", costs.gather(far_WW.sum(1), self._row)),
            costs.exchange("dispatch of what came over", INNER, "dispatch", "arrive", far_WW * self._row),
        ]

    def arrive(self) -> Stages:
        return [self._arranged("arrange what came over", self._far)]

    def _arranged(self, name: str, inside: Inside) -> Stage:
        return arrange(self.costs, name, inside.rows_WW.sum(0), inside.each_WW.sum(0), self.fp8)

    def products(self) -> Stages:
        return [self.costs.products(self.traffic, self.traffic.rows_W)]

    def give_back(self) -> Stages:
        return [*self.give_back_far(), *self.give_back_own()]

    def products_of_own(self, share: float = 1.0) -> Stages:
        """Of the node's own tokens alone, while other nodes' rows are under way; `share` of the experts."""
        return [self.costs.products(self.traffic, self._near.each_WW.sum(0), share)]

    def products_of_far(self) -> Stages:
        return [self.costs.products(self.traffic, self._far.each_WW.sum(0))]

    def give_back_own(self) -> Stages:
        return self._back("own", self._near, "finish")

    def give_back_far(self) -> Stages:
        return self._back("other nodes'", self._far, "pass_back")

    def _back(self, whose: str, inside: Inside, until: str) -> Stages:
        costs, native, rows_WW = self.costs, self.costs.shape.native_row, inside.each_WW
        return [
            costs.work(f"restore {whose}", "combine", costs.gather(rows_WW.sum(0), native)),
            costs.exchange(f"combine {whose} inside nodes", INNER, "combine", until, rows_WW.T * native),
        ]

    def pass_back(self) -> Stages:
        costs, traffic, native = self.costs, self.traffic, self.costs.shape.native_row
        if self.is_ring:
            over = costs.ring("combine between nodes", "combine", "finish", traffic.ring_NM * native)
        else:
            over = costs.exchange("combine between nodes", OUTER, "combine", "finish", traffic.rail_WW.T * native)
        return [costs.work("sum other nodes'", "combine", costs.reduce(self._far.each_WW.sum(1))), over]

    def finish(self) -> Stages:
        costs, native = self.costs, self.costs.shape.native_row
        sums_W = self.traffic.tokens_W + self.traffic.rail_WW.sum(1)  # a node's own, and those that came back
        seconds_W = costs.reduce(self._near.each_WW.sum(1) + sums_W) + costs.gather(sums_W, native)
        return [costs.work("sum", "combine", seconds_W)]


def arrange(costs: Costs, name: str, arrived_W: Counts, rows_W: Counts, fp8: bool) -> Stage:
    """Rows as they arrived -> rows by slot, in the form that the experts take."""
    native = costs.shape.native_row
    if costs.shape.fp8_experts:  # their products gather, and quantise what does not come in FP8
        quantised_W = costs.encode(0 * arrived_W if fp8 else arrived_W)
        return costs.work(name, "dispatch", quantised_W)
    gather_W = costs.gather(rows_W, native)
    return costs.work(name, "dispatch", gather_W + costs.decode(arrived_W) if fp8 else gather_W)


def slots_together(forms: Sequence[FlatStages | NodeStages]) -> Stages:
    """Slots and weights of what crosses to other nodes, of all chunks in one exchange, rows or none."""
    of_chunks = [form.slots() for form in forms if isinstance(form, NodeStages)]
    return _together("slots", OUTER, "plan_far", forms[0].costs, of_chunks) if of_chunks else []


def index_together(forms: Sequence[FlatStages | NodeStages]) -> Stages:
    """Which row stands where, of all chunks in one exchange; none where every row travels by itself."""
    lane, of_chunks = INNER if isinstance(forms[0], NodeStages) else OUTER, [form.index() for form in forms]
    return _together("index", lane, "send", forms[0].costs, of_chunks) if any(map(np.any, of_chunks)) else []


def _together(name: str, lane: str, until: str, costs: Costs, bytes_of_chunks: list[Counts]) -> Stages:
    bytes_WW = sum(bytes_of_chunks[1:], bytes_of_chunks[0])
    return [costs.exchange(name, lane, "plan", until, bytes_WW)]


def worth_once(each_WW: Counts, once_WW: Counts, row_bytes: int) -> bool:
    """Whether tokens travel once to a rank with several of their experts, as `comm.once.is_worth_it` decides."""
    saved_WW = each_WW - once_WW
    return int(saved_WW.sum() - np.trace(saved_WW)) * row_bytes > len(each_WW) * WORTH_BYTES
