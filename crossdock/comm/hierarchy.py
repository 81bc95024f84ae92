"""`HierarchicalDispatcher`: the flat exchange used twice, over nodes and inside them, for links of two speeds.

    x_TD --rail--> far rows --node--> rows by slot          a token crosses to a node once,
     |---------------node-----------> rows by slot          its own node it reaches directly

    out --node--> sums of far tokens --rail--> home         results are summed where they were computed,
     |---node--> sums of own tokens ------------> y_TD      one row a (token, node) returns

Far rows leave first. While they are under way, this node's own travel inside it and can be computed. `portions` are
rows that can be computed one after another, near ones n and far ones f:

    nf       the near ones while the far ones come
    nnfnn    the far ones amid the near ones: both legs of their way here, and of their results' way home, have products
             to be under way in, and most experts' weights are still read twice only, as an n is some of the experts

A token's results in a node are added in the order of k, in float32, and rounded to the layer's dtype; its home adds the
nodes' sums in ascending order, in float32, and rounds once more. So the result depends on which ranks share a node, not
on their number otherwise, nor on anything that timing decides.

Rejected: a ring of nodes along which sums accumulate. One row a token comes home instead of one a node, but all the way
from the farthest of these, past the others: no fewer bytes on any link of a switched network, N - 1 hops one after
another instead of one, and a rounding more for each. With 2 nodes it is this.

Legend: T tokens, D hidden, K experts per token, A rows that arrive from other nodes, R rows by slot.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from crossdock.backend import Backend
from crossdock.comm.agreement import gather_agreed
from crossdock.comm.codec import Codec
from crossdock.comm.combine import need_gradient, weigh
from crossdock.comm.form import ExchangeForm
from crossdock.comm.inbound import Inbound, decode, receive
from crossdock.comm.lane import Lane, by_slot
from crossdock.comm.node_plan import NodePlan, Part, order, place, plan_over_nodes
from crossdock.comm.places import Choices, Counts, Places
from crossdock.comm.plan import DispatchPlan, check_parts_alike, check_slots, check_weights
from crossdock.comm.transport import Done, Pending, Then, Transport
from crossdock.errors import ConfigError

RAIL, NODE = " between nodes", " inside the node"
PORTIONS = {2: "nf", 5: "nnfnn"}
CUTS = {2: (), 5: (0.25, 0.4, 0.6)}  # where near rows are divided; a leg over nodes has more to be hidden by
MOVED = 0.07  # part of the near rows by which a cut may move to stand between two experts


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

    def dispatch_async(self, x_TD: Tensor, plan: NodePlan) -> "Arriving":
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
    ) -> "Returning":
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


class Legs:
    """A Pending of rows that go on from where they first arrive: over nodes, then inside one."""

    def advance(self) -> None:
        """Waits for the leg under way and starts the next; `wait` then has that one to wait for."""
        raise NotImplementedError


class Arriving(Legs):
    """Rows under way in two legs: over the rail, then inside the node. `advance` starts the second."""

    def __init__(self, form: HierarchicalDispatcher, x_TD: Tensor, plan: NodePlan) -> None:
        self.form, self.x_TD, self.plan = form, x_TD, plan
        wire_TX = form.encoded(x_TD)
        self._crossing = form.rail.tokens(wire_TX, plan.outer)
        self._near = form.node.tokens(wire_TX, plan.near)
        self._far: Pending[Tensor] | None = None
        self._far_x_AD = x_TD  # once they are here: far rows, as a function of x
        self._near_inbound: Inbound | None = None

    def advance(self) -> None:
        """Waits for the rows from other nodes, and sends them on inside this one."""
        if self._far is not None:
            return
        crossed_AX = by_slot(self._crossing.wait(), self.plan.outer)
        form, dtype = self.form, self.x_TD.dtype
        if need_gradient(self.x_TD):
            decoded = Then(lambda: decode(crossed_AX, form.codec, dtype))
            self._far_x_AD = form.rail.tracked(self.x_TD, decoded, self.plan.outer)
        self._far = form.node.tokens(crossed_AX, self.plan.far)

    def portions(self, number: int) -> list[Pending[Inbound]]:
        """The rows in PORTIONS[number], to be waited for in their order; their results are for `Returning.start`."""
        near_rows, ends_L = self.plan.near_rows, self.plan.near.ends_L
        cuts = [int(near_rows * cut) for cut in CUTS[number]]
        if not ends_L.is_cuda:  # the weights of an expert that is divided are read once more
            ends = np.array([0, *ends_L.tolist()])
            between = [int(ends[np.abs(ends - cut).argmin()]) for cut in cuts]
            cuts = [b if abs(b - cut) <= MOVED * near_rows else cut for b, cut in zip(between, cuts, strict=True)]
        near = iter([partial(self._near_part, *span) for span in pairwise([0, *cuts, near_rows])])
        return [Then(self._far_part if kind == "f" else next(near)) for kind in PORTIONS[number]]

    def _near_part(self, first: int, end: int) -> Inbound:
        if self._near_inbound is None:
            self._near_inbound = self._receive_near()
        else:
            self.advance()
        return self._near_inbound.part(first, end)

    def _far_part(self) -> Inbound:
        self.advance()
        return self._receive_far()

    def wait(self) -> Inbound:
        """All rows, by (slot, near or far, source rank, token, k)."""
        plan, codec = self.plan, self.form.codec
        if need_gradient(self.x_TD):
            near = self._receive_near()
            self.advance()
            rows_RD = torch.cat([near.rows_RD, self._receive_far().rows_RD]).index_select(0, plan.merge_R)
            return Inbound(rows_RD, plan.ends_L, plan)
        takes_codes = codec is not None and not codec.decode_on_arrival
        if self.x_TD.device.type == "cpu" and not takes_codes:
            return Inbound(self._placed(), plan.ends_L, plan)
        self.advance()
        near_UX, far_UX = self._near.wait(), self._arrived_far()
        ids_R = torch.cat([order(near_UX, plan.near), order(far_UX, plan.far) + len(near_UX)])
        rows_UX, ids_R = torch.cat([near_UX, far_UX]), ids_R.index_select(0, plan.merge_R)
        if takes_codes:
            return Inbound(rows_UX, plan.ends_L, plan, ids_R, codec, self.x_TD.dtype)
        rows_RD = decode(rows_UX, codec, self.x_TD.dtype).index_select(0, ids_R)
        return Inbound(rows_RD, plan.ends_L, plan)

    def _placed(self) -> Tensor:
        """Each row copied once, to its place, the near ones while the far ones are under way; for CPUs."""
        plan, codec, dtype = self.plan, self.form.codec, self.x_TD.dtype
        near_UD = decode(self._near.wait(), codec, dtype)
        rows_RD = self.x_TD.new_empty(len(plan.merge_R), self.x_TD.shape[1])
        place(near_UD, plan.near, plan.spans[0], rows_RD)
        self.advance()
        place(decode(self._arrived_far(), codec, dtype), plan.far, plan.spans[1], rows_RD)
        return rows_RD

    def _arrived_far(self) -> Tensor:
        assert self._far is not None
        return self._far.wait()

    def _receive_near(self) -> Inbound:
        return receive(self.x_TD, self._near, self.form.node, self.plan.near, self.form.codec)

    def _receive_far(self) -> Inbound:
        assert self._far is not None
        return receive(self._far_x_AD, self._far, self.form.node, self.plan.far, self.form.codec)


class Returning(Legs):
    """Results under way in two legs: inside the nodes, then over the rail. `advance` starts the second."""

    def __init__(
        self,
        form: HierarchicalDispatcher,
        plan: NodePlan,
        weights_TK: Tensor,
        plus_TD: Tensor | None,
        portions: int = 2,
    ) -> None:
        self.form, self.plan, self.weights_TK, self.plus_TD = form, plan, weights_TK, plus_TD
        self._to_come = PORTIONS[portions]
        self._near: list[Tensor] = []
        known = plan.far_weights_AK
        if known is None:
            self._far_weights_AK = form.send_weights(weights_TK, plan)
        else:
            if known.is_cuda:  # from the stream of the plan, for that of the exchange
                known.record_stream(torch.cuda.current_stream(known.device))
            self._far_weights_AK = Done(form.rail.followed(weights_TK.float(), known, plan.outer, "weights"))
        self._inside: dict[str, Pending[Tensor]] = {}
        self._crossing: Pending[Tensor] | None = None

    def start(self, out_RD: Tensor, portion: Inbound) -> None:
        """The experts' rows for the next of the portions; far ones leave at once, near ones when they are all there.

        Raises ConfigError for another shape, dtype or device.
        """
        expected = tuple(self.plan.near.outgoing.position_TK.shape)
        self.form.check_combine(out_RD, portion.rows, self.weights_TK, expected, self.plus_TD)
        kind, self._to_come = self._to_come[0], self._to_come[1:]
        if kind == "f":
            return self.send("far", out_RD, self.plan.far)
        self._near.append(out_RD)
        if "n" not in self._to_come:
            self.send("near", self._near[0] if len(self._near) == 1 else torch.cat(self._near), self.plan.near)
            self._near.clear()
        elif "far" in self._inside:  # which had this portion's products to return in
            self.advance()

    def send(self, portion: str, out_RD: Tensor, plan: DispatchPlan) -> None:
        """Results leave for the ranks where their rows entered the node. They have been checked."""
        self._inside[portion] = self.form.node.back(out_RD, plan, self.weights_TK)

    def advance(self) -> None:
        """Waits for far tokens' results, adds them up, and sends the sums home."""
        if self._crossing is not None:
            return
        plan, form = self.plan, self.form
        back_SD = self._inside["far"].wait()
        sums_AD = weigh(back_SD, self._far_weights_AK.wait(), plan.far.outgoing, None, form.backend)
        self._crossing = form.rail.back(sums_AD, plan.outer, self.weights_TK)

    def wait(self) -> Tensor:
        """y [T, D]."""
        self.advance()
        assert self._crossing is not None
        plan, backend = self.plan, self.form.backend
        near_TD = weigh(self._inside["near"].wait(), self.weights_TK, plan.near.outgoing, None, backend)
        return weigh(torch.cat([near_TD, self._crossing.wait()]), None, plan.home, self.plus_TD, backend)
