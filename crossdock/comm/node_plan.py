"""`NodePlan`: where rows go when a token crosses to a node once; two flat plans, one over nodes and one inside them.

Legend: T tokens here, K experts per token, J nodes a token can be on (`places`), L slots a rank, N nodes, M ranks on a
node, A rows that arrive from other nodes, S rows sent over the rail, R rows by slot.

    rail     the ranks of the same number inside each node, one a node
    outer    over the rail: token t to each other node that holds one of its experts
    near     inside the node: this rank's own tokens to this node's slots
    far      inside the node: what arrived over the rail, to this node's slots

    2 nodes of 2 ranks, seen from rank 0        rank 0 --outer--> rank 2
                                                  | near            | far, near
                                                rank 1            rank 3

One gather over all ranks gives every count that these plans need (`places`), and says who disagrees. The slots that a
token chose in another node travel with the plan, K integers for each row that will cross, and so do its weights where
they are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from crossdock.comm.explain import Hop, Sender, Traffic, plain_hops
from crossdock.comm.lane import Lane
from crossdock.comm.once import Planned, is_worth_it, with_once
from crossdock.comm.places import Choices, Counts
from crossdock.comm.plan import DispatchPlan, Integers, Outgoing, by_slot, complete_plan, plan_once, plan_outgoing


@dataclass(frozen=True)
class NodePlan:
    """`home` adds up what comes back to this rank: rows are its near sums [T], then what returned over the rail.

    `direct` are the rows that this rank would send to each rank, and get from it, without nodes. far_weights_AK
    (float32, without history) are the weights of the rows that arrive, and weights_TK those of this rank's tokens,
    where the plan was made with weights.
    """

    outer: DispatchPlan
    near: DispatchPlan
    far: DispatchPlan
    home: Outgoing
    step: int
    direct: tuple[list[int], list[int]]
    sender: Sender
    far_weights_AK: Tensor | None = None
    weights_TK: Tensor | None = None

    def explain(self) -> Traffic:
        """What this rank sends, before and after."""
        sender, rail, inside = self.sender, "between nodes", "inside the node"
        number = sender.topology.ranks_of_node(sender.topology.node_of_rank[sender.rank]).index(sender.rank)

        def inner(name: str, counts_M: list[int], row_bytes: int) -> Hop:
            own = counts_M[number]
            return Hop(f"{name} {inside}", (own, sum(counts_M) - own, 0), row_bytes)

        sent = [plan.send_counts if plan.once is None else plan.once.send_counts for plan in (self.near, self.far)]
        after = (
            Hop(f"dispatch {rail}", (0, 0, sum(self.outer.send_counts)), sender.row_bytes),
            inner("dispatch", sent[0], sender.row_bytes) + inner("dispatch", sent[1], sender.row_bytes),
            inner("combine", self.near.recv_counts, sender.back_bytes)
            + inner("combine", self.far.recv_counts, sender.back_bytes),
            Hop(f"combine {rail}", (0, 0, sum(self.outer.recv_counts)), sender.back_bytes),
        )
        return Traffic(plain_hops(sender, *self.direct), after)

    @cached_property
    def ends_2L(self) -> Integers:
        """Where each slot's near rows end, among those, and its far rows."""
        return np.stack([plan.ends_L.cpu().numpy() for plan in (self.near, self.far)]).astype(np.int64)

    @cached_property
    def spans(self) -> list[list[tuple[int, int, int]]]:
        """For each slot that has any: near rows first to end, and where they start among all rows; the same for far."""
        counts_2L = np.diff(self.ends_2L, prepend=0)
        begins_L2 = counts_2L.T.cumsum().reshape(-1, 2) - counts_2L.T
        parts = zip(self.ends_2L - counts_2L, self.ends_2L, begins_L2.T, strict=True)
        return [
            [span for span in zip(*map(np.ndarray.tolist, part), strict=True) if span[0] < span[1]] for part in parts
        ]

    @cached_property
    def merge_R(self) -> Tensor:
        """int64: which of the near rows and, behind them, the far ones stands in each place of the order by slot."""
        return torch.from_numpy(by_slot(np.diff(self.ends_2L, prepend=0))).to(self.near.ends_L.device)

    @property
    def near_rows(self) -> int:
        return sum(self.near.recv_counts)

    @cached_property
    def places_R(self) -> Tensor:
        """int64: where each of the near rows and, behind them, the far ones stands in the order by slot."""
        return torch.empty_like(self.merge_R).scatter_(
            0, self.merge_R, torch.arange(len(self.merge_R)).to(self.merge_R)
        )

    @cached_property
    def merged_near(self) -> DispatchPlan:
        """`near` for results that stand in the order of all rows by slot."""
        return _restored_from(self.near, self.places_R[: self.near_rows])

    @cached_property
    def merged_far(self) -> DispatchPlan:
        """`far` for results that stand in the order of all rows by slot."""
        return _restored_from(self.far, self.places_R[self.near_rows :])

    @cached_property
    def ends_L(self) -> Tensor:
        """int32 [L], where each slot's rows end, near and far ones together."""
        return self.near.ends_L + self.far.ends_L


@dataclass(frozen=True)
class Part:
    """One of several exchanges that are planned together: this rank's choices, its weights float32 [T, K] where they
    are known, and every rank's counts."""

    choices: Choices
    weights_TK: Tensor | None
    counts: Counts


def plan_over_nodes(
    parts: Sequence[Part], lanes: tuple[Lane, Lane], step: int, sender: Sender, device: torch.device
) -> list[NodePlan]:
    """Their plans, the first of which is exchange `step`.

    A collective over rail and node, which `lanes` are over, with one exchange on each: slots of the rows that will
    cross, and their weights, then which row stands where in the node.
    """
    rail, node = lanes
    outer, crossing = [], []
    for number, part in enumerate(parts):
        places = part.choices.places
        going = plan_outgoing(torch.from_numpy(part.choices.stops_TJ), places.topology.num_nodes)
        slots_SK = part.choices.crossing(going.order_S.numpy())
        going = Outgoing(going.order_S.to(device), going.position_TK.to(device), going.counts_P)
        plan = complete_plan(going, part.counts.over_rail(places), rail.transport.rank, step + number)
        outer.append(plan)
        crossing.append(_with_weights(torch.from_numpy(slots_SK).to(device), part.weights_TK, plan))
    arriving = rail.together(crossing, outer, "plan")
    top_k = parts[0].choices.slot_ids_TK.shape[1]
    near_ids = [torch.from_numpy(part.choices.on(part.choices.places.node)) for part in parts]
    near = [
        _plan_inside(*some, False, node, sender.row_bytes, device) for some in zip(near_ids, parts, outer, strict=True)
    ]
    arrived = arriving.wait()
    far_ids = [arrived_AX[:, :top_k].cpu().to(torch.int64) for arrived_AX in arrived]
    far = [
        _plan_inside(*some, True, node, sender.row_bytes, device) for some in zip(far_ids, parts, outer, strict=True)
    ]
    inside = with_once([*near, *far], node)
    plans = []
    for number, part in enumerate(parts):
        places, home = part.choices.places, _home(outer[number].outgoing, part.choices)
        weights = None if part.weights_TK is None else part.weights_TK.detach().clone()  # as they were
        far_weights = None if weights is None else arrived[number][:, top_k:].contiguous().view(torch.float32)
        near_plan, far_plan = inside[number], inside[len(parts) + number]
        direct = part.counts.direct(places)
        made = outer[number], near_plan, far_plan, home, step + number, direct, sender
        plans.append(NodePlan(*made, far_weights_AK=far_weights, weights_TK=weights))
    return plans


def _with_weights(slots_SK: Tensor, weights_TK: Tensor | None, outer: DispatchPlan) -> Tensor:
    """int32 [S, K or 2K]: the slots that each row sent over the rail is for, then its weights, as they are."""
    if weights_TK is None:
        return slots_SK
    token_S = outer.outgoing.order_S.div(outer.outgoing.position_TK.shape[1], rounding_mode="floor")
    weights_SK = weights_TK.detach().index_select(0, token_S)
    return torch.cat([slots_SK, weights_SK.view(torch.int32)], 1)


def _plan_inside(
    ids_TK: Tensor, part: Part, outer: DispatchPlan, is_far: bool, lane: Lane, row_bytes: int, device: torch.device
) -> Planned:
    """A flat plan of a node for the rows that ids_TK gives slots in the node."""
    slots_MP, once_MM = part.counts.in_node(part.choices.places, is_far)
    rank, size = lane.transport.rank, lane.transport.world_size
    outgoing = plan_outgoing(ids_TK, slots_MP.shape[1], device)
    plan = complete_plan(outgoing, slots_MP.tolist(), rank, outer.step)
    saved_MM = slots_MP.reshape(size, size, -1).sum(-1) - once_MM
    if not is_worth_it(int(saved_MM.sum() - np.trace(saved_MM)), size, row_bytes):
        return Planned(plan)
    return Planned(plan, plan_once(outgoing, size), tuple(once_MM[:, rank].tolist()))


def _restored_from(plan: DispatchPlan, places_R: Tensor) -> DispatchPlan:
    return replace(plan, restore_R=places_R if plan.restore_R is None else places_R.index_select(0, plan.restore_R))


def _home(over_rail: Outgoing, choices: Choices) -> Outgoing:
    """Sums over nodes, ascending: token t's near sum is row t, its other nodes' rows follow in the order sent."""
    tokens, device = len(over_rail.position_TK), over_rail.order_S.device
    place_T = torch.from_numpy((choices.nodes_TJ == choices.places.node).reshape(-1).nonzero()[0]).to(device)
    position_TJ = over_rail.position_TK + tokens
    position_TJ.view(-1)[place_T] = torch.arange(tokens, device=device)
    return Outgoing(torch.cat([place_T, over_rail.order_S]), position_TJ, [])


def place(arrived: Tensor, plan: DispatchPlan, spans: list[tuple[int, int, int]], rows_RD: Tensor) -> None:
    """Copies what arrived into rows_RD: of the plan's order by slot, places `first` to `end` go to `start` and on."""
    for first, end, start in spans:
        here_RD = rows_RD[start : start + end - first]
        if plan.order_R is None:
            here_RD.copy_(arrived[first:end])
        else:
            torch.index_select(arrived, 0, plan.order_R[first:end], out=here_RD)


def order(arrived: Tensor, plan: DispatchPlan) -> Tensor:
    """Which row arrived stands in each place, where that is all of them in turn, too."""
    return torch.arange(len(arrived), device=arrived.device) if plan.order_R is None else plan.order_R
