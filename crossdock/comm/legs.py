"""`Arriving` and `Returning`: rows under way over nodes and then inside one, and the other way round.

The rows of a chunk can be had at once, or in portions (`Arriving.portions`), near ones n, which this node's own tokens
brought, and far ones f:

    nf       the near ones while the far ones come
    nnfnn    the far ones amid the near ones: both legs of their way here, and of their results' way home, have products
             to be under way in, and most experts' weights are still read twice only, as an n is some of the experts

Legend: T tokens, D hidden, K experts per token, A rows that arrive from other nodes, S rows sent, R rows by slot.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from crossdock.comm.combine import need_gradient, weigh
from crossdock.comm.inbound import Inbound, decode, receive
from crossdock.comm.lane import by_slot
from crossdock.comm.node_plan import NodePlan, order, place
from crossdock.comm.plan import DispatchPlan
from crossdock.comm.transport import Done, Pending, Then
from crossdock.errors import ConfigError

if TYPE_CHECKING:
    from crossdock.comm.hierarchy import HierarchicalDispatcher

PORTIONS = {2: "nf", 5: "nnfnn"}
CUTS = {2: (), 5: (0.25, 0.35, 0.5)}  # where near rows are divided; legs over nodes have more to be hidden by
MOVED = 0.07  # part of the near rows by which a cut may move to stand between two experts


class Legs:
    """A Pending of rows that go on from where they first arrive: over nodes, then inside one."""

    def advance(self) -> None:
        """Waits for the leg under way and starts the next; `wait` then has that one to wait for."""
        raise NotImplementedError


class Arriving(Legs):
    """Rows under way in two legs: over the rail, then inside the node. `advance` starts the second."""

    def __init__(self, form: "HierarchicalDispatcher", x_TD: Tensor, plan: NodePlan) -> None:
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
        form: "HierarchicalDispatcher",
        plan: NodePlan,
        weights_TK: Tensor,
        plus_TD: Tensor | None,
        portions: int = 2,
    ) -> None:
        self.form, self.plan, self.weights_TK, self.plus_TD = form, plan, weights_TK, plus_TD
        self._to_come = PORTIONS[portions]
        self._near: tuple[Tensor, DispatchPlan] | None = None  # near results as far as they are there
        self._near_rows = 0
        known = plan.far_weights_AK
        if known is None:
            self._far_weights_AK = form.send_weights(weights_TK, plan)
        else:
            _check_known(weights_TK, plan)
            if known.is_cuda:  # from the stream of the plan, for that of the exchange
                known.record_stream(torch.cuda.current_stream(known.device))
            self._far_weights_AK = Done(form.rail.followed(weights_TK.float(), known, plan.outer, "weights"))
        self._inside: dict[str, Pending[Tensor]] = {}
        self._crossing: Pending[Tensor] | None = None

    def start(self, out_RD: Tensor, portion: Inbound) -> None:
        """The experts' rows for the next of the portions. Far ones leave at once, near ones behind them when they are
        all there: the order in which `combine_async` has them leave, so that ranks may differ in which they use.

        Raises ConfigError for another shape, dtype or device.
        """
        expected = tuple(self.plan.near.outgoing.position_TK.shape)
        self.form.check_combine(out_RD, portion.rows, self.weights_TK, expected, self.plus_TD)
        kind, self._to_come = self._to_come[0], self._to_come[1:]
        if kind == "f":
            self.send("far", out_RD, self.plan.far)
        else:
            self._keep(out_RD)
        if not self._to_come:
            assert self._near is not None
            self.send("near", *self._near)
            self._near = None
        elif kind == "n" and "far" in self._inside:  # which had this portion's products to return in
            self.advance()

    def _keep(self, out_RD: Tensor) -> None:
        """Of near rows, the next results: all of them, or some, which are put in the order in which they will leave."""
        near = self.plan.near
        if len(out_RD) == self.plan.near_rows:
            self._near = out_RD, near
            return
        if self._near is None:
            in_order = replace(near, arrange_R=None, restore_R=None)
            self._near = out_RD.new_empty(self.plan.near_rows, out_RD.shape[1]), in_order
        near_SD, some = self._near[0], slice(self._near_rows, self._near_rows + len(out_RD))
        self._near_rows = some.stop
        if near.arrange_R is None:
            near_SD[some] = out_RD
        else:
            near_SD.index_copy_(0, near.arrange_R[some], out_RD)

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


def _check_known(weights_TK: Tensor, plan: NodePlan) -> None:
    """Raises ConfigError for others than those that have travelled with the plan; on a GPU that would wait for it."""
    known_TK = plan.weights_TK
    if known_TK is None or known_TK.is_cuda or known_TK.shape != weights_TK.shape:
        return
    if not torch.allclose(known_TK, weights_TK.detach().float(), rtol=0.0, atol=0.0, equal_nan=True):
        raise ConfigError("weights_TK of combine must be those of the plan, which have gone to other nodes with it")
