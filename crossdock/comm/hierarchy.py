"""`HierarchicalDispatcher`: the flat exchange used twice, over nodes and inside them, for links of two speeds.

    x_TD --rail--> far rows --node--> rows by slot          a token crosses to a node once,
     |---------------node-----------> rows by slot          its own node it reaches directly

    out --node--> sums of far tokens --rail--> home         results are summed where they were computed,
     |---node--> sums of own tokens ------------> y_TD      one row a (token, node) returns

Far rows leave first. While they are under way, this node's own travel inside it and can be computed (`legs`).

A token's results in a node are added in the order of k, in float32, and rounded to the layer's dtype; its home adds the
nodes' sums in ascending order, in float32, and rounds once more. So the result depends on which ranks share a node, not
on their number otherwise, nor on anything that timing decides.

Rejected: a ring of nodes along which sums accumulate. One row a token comes home instead of one a node, but all the way
from the farthest of these, past the others: no fewer bytes on any link of a switched network, N - 1 hops one after
another instead of one, and a rounding more for each. With 2 nodes it is this.

Legend: T tokens, D hidden, K experts per token, A rows that arrive from other nodes, R rows by slot.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from crossdock.backend import Backend
from crossdock.comm.agreement import gather_agreed
from crossdock.comm.codec import Codec
from crossdock.comm.combine import need_gradient
from crossdock.comm.form import ExchangeForm
from crossdock.comm.inbound import Inbound
from crossdock.comm.lane import Lane, by_slot
from crossdock.comm.legs import Arriving, Returning
from crossdock.comm.node_plan import NodePlan, Part, plan_over_nodes
from crossdock.comm.places import Choices, Counts, Places
from crossdock.comm.plan import check_parts_alike, check_slots, check_weights
from crossdock.comm.transport import Pending, Then, Transport
from crossdock.errors import ConfigError

RAIL, NODE = " between nodes", " inside the node"


class HierarchicalDispatcher(ExchangeForm):
    """The same calls as `Dispatcher`, for ranks on several nodes, equally many on each.

    `plan` takes the weights where they are known: they travel with it, and `combine` must then get the same. Otherwise
    combine sends them. Making one is a collective. Raises ConfigError for unequal nodes, and PlanMismatch
    where ranks differ in what they make.
    """

    hierarchy = "node"

    def __init__(
        self,
        transport: Transport,
        num_slots: int,
        hidden_size: int,
        dtype: torch.dtype,
        backend: Backend = "auto",
        codec: Codec | None = None,
    ) -> None:
        super().__init__(transport, num_slots, hidden_size, dtype, backend, codec)
        topology = transport.topology
        ranks_N = [topology.ranks_of_node(node) for node in range(topology.num_nodes)]
        if len({len(ranks) for ranks in ranks_N}) > 1:
            found = ", ".join(str(len(ranks)) for ranks in ranks_N)
            raise ConfigError(f"the exchange over nodes needs equally many ranks on each, found {found}: use 'flat'")
        gather_agreed(transport, self.header(0), [], f"start of MoE layer {self.layer}")
        self.places = Places(topology, transport.rank, num_slots // transport.world_size)
        rail, node = _parts(transport, ranks_N)
        self.rail = Lane(rail, self.layer, backend, RAIL)
        self.node = Lane(node, self.layer, backend, NODE)

    def plan(self, slot_ids_TK: Tensor, weights_TK: Tensor | None = None, *, checked: bool = False) -> NodePlan:
        """As `Dispatcher.plan`; ids are always checked. A collective of all ranks, with weights on all or none."""
        return self.plans([slot_ids_TK], None if weights_TK is None else [weights_TK], checked=checked)[0]

    def plans(
        self, parts: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, checked: bool = False
    ) -> list[NodePlan]:
        """`plan` of several exchanges, equally many on all ranks, with one gather of counts."""
        check_parts_alike(parts)
        if weights is not None and len(weights) != len(parts):
            raise ConfigError(f"weights must be given for each of the {len(parts)} parts, found {len(weights)}")
        for slot_ids_TK, weights_TK in zip(parts, weights or (), strict=weights is not None):
            check_weights(weights_TK, tuple(slot_ids_TK.shape), slot_ids_TK, "slot_ids")
        ids = [slot_ids_TK.cpu().numpy() for slot_ids_TK in parts]
        for slot_ids in ids:
            check_slots(slot_ids, self.num_slots)
        first, device = self.step + 1, parts[0].device
        self.step += len(parts)
        choices = [Choices(slot_ids, self.places) for slot_ids in ids]
        counts = [count for choice in choices for count in choice.counts()]
        header = self.header(parts[0].shape[1], len(parts), weights is not None)
        phase = f"plan of exchange {first} in MoE layer {self.layer}"
        if first == 1:  # afterwards equally many counts are gathered
            gather_agreed(self.transport, header, [], phase)
        gathered = Counts.split(gather_agreed(self.transport, header, counts, phase), self.num_slots, len(parts))
        lanes = self.rail, self.node
        known = [None] * len(parts) if weights is None else [weights_TK.float() for weights_TK in weights]
        planned = [Part(*part) for part in zip(choices, known, gathered, strict=True)]
        return plan_over_nodes(planned, lanes, first, self.sender, device)

    def dispatch(self, x_TD: Tensor, plan: NodePlan) -> Inbound:
        """Sends x[t] to each slot chosen for t. Differentiable. Raises ConfigError for another shape or dtype."""
        return self.dispatch_async(x_TD, plan).wait()

    def dispatch_async(self, x_TD: Tensor, plan: NodePlan) -> Arriving:
        """The same, started: other work can run before `wait`, or between what `portions` gives."""
        self.check_rows("x_TD", x_TD, len(plan.near.outgoing.position_TK))
        return Arriving(self, x_TD, plan)

    def combine(self, out_RD: Tensor, weights_TK: Tensor, inbound: Inbound, plus_TD: Tensor | None = None) -> Tensor:
        """y[t] = sum over nodes, ascending, of the sums over k in each (+ plus[t]) -> [T, D] in out's dtype.

        Sums are float32 inside and rounded in each node, and once more before `plus_TD`, in out's dtype, is added.
        out_RD stands in the order of the inbound rows. Choices of -1 add nothing. Differentiable in all three.
        """
        return self.combine_async(out_RD, weights_TK, inbound, plus_TD).wait()

    def combine_async(
        self, out_RD: Tensor, weights_TK: Tensor, inbound: Inbound, plus_TD: Tensor | None = None
    ) -> Returning:
        """The same, started: other work can run before `wait`."""
        plan = inbound.plan
        if not isinstance(plan, NodePlan):
            raise ConfigError("combine must get what this form of the exchange dispatched, found rows of another form")
        expected = tuple(plan.near.outgoing.position_TK.shape)
        self.check_combine(out_RD, len(plan.merge_R), weights_TK, expected, plus_TD)
        returning = Returning(self, plan, weights_TK, plus_TD)
        if need_gradient(out_RD, weights_TK, plus_TD):
            returning.send("far", out_RD.index_select(0, plan.places_R[plan.near_rows :]), plan.far)
            returning.send("near", out_RD.index_select(0, plan.places_R[: plan.near_rows]), plan.near)
        else:
            returning.send("far", out_RD, plan.merged_far)
            returning.send("near", out_RD, plan.merged_near)
        return returning

    def send_weights(self, weights_TK: Tensor, plan: NodePlan) -> Pending[Tensor]:
        """Each far row's weights, float32 [A, K], to the rank where it enters the node; differentiable."""
        weights_TK = weights_TK.float()
        crossing = self.rail.tokens(weights_TK, plan.outer, "weights")
        arrived = Then(lambda: by_slot(crossing.wait(), plan.outer))
        return Then(lambda: self.rail.followed(weights_TK, arrived.wait(), plan.outer, "weights"))


_PARTS: WeakKeyDictionary[Transport, tuple[Transport, Transport]] = WeakKeyDictionary()


def _parts(transport: Transport, ranks_N: list[tuple[int, ...]]) -> tuple[Transport, Transport]:
    """The transports of this rank's rail and node. All layers share them: each may cost connections and threads."""
    if transport not in _PARTS:
        rails = sorted(sorted(rail) for rail in zip(*ranks_N, strict=True))
        _PARTS[transport] = transport.split(rails), transport.split(ranks_N)
    return _PARTS[transport]
