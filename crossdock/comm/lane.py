"""`Lane`: rows along a plan, to the ranks that hold their slots and back, over one transport; differentiable.

    tokens     x_TX     --> rows as they arrive, by source; plan.order_R reads them by slot
    back       out_RD   --> rows in the order they were sent, on the ranks they came from

An exchange is one lane; one in two steps, over nodes and inside them, is two. The backward of `tokens` is `back` and a
sum with weights of one, and that of `back` is a send.

Legend: T tokens, D hidden, X width of a row as it travels, S rows sent, R rows received, U rows sent once a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.backend import Backend
from crossdock.comm.combine import need_gradient, weighted_sum
from crossdock.comm.plan import DispatchPlan
from crossdock.comm.transport import Done, Pending, Then, Transport


@dataclass(frozen=True)
class Lane:
    """`where` says in errors which step this is, of an exchange that has several."""

    transport: Transport
    layer: int
    backend: Backend
    where: str = ""

    def phase(self, what: str, step: int) -> str:
        return f"{what}{self.where} of exchange {step} in MoE layer {self.layer}"

    def tokens(self, x_TX: Tensor, plan: DispatchPlan, what: str = "dispatch") -> Pending[Tensor]:
        """x[t] to each slot chosen for t; what arrives stands in the order that `by_slot` takes. Not differentiable."""
        once = plan.once
        if once is not None:
            if once.token_U is None:
                return Done(x_TX.detach())
            rows_UX = x_TX.detach().index_select(0, once.token_U)
            phase = self.phase(what, plan.step)
            return self.transport.all_to_all_rows(rows_UX, once.send_counts, once.recv_counts, phase)
        token_S = plan.outgoing.order_S.div(plan.outgoing.position_TK.shape[1], rounding_mode="floor")
        return self.rows(x_TX.detach().index_select(0, token_S), plan, what)

    def rows(self, rows_SX: Tensor, plan: DispatchPlan, what: str) -> Pending[Tensor]:
        """Rows in send order -> as they arrive, one for each (token, k)."""
        if self.transport.world_size == 1:
            return Done(rows_SX)
        phase = self.phase(what, plan.step)
        return self.transport.all_to_all_rows(rows_SX, plan.send_counts, plan.recv_counts, phase)

    def together(self, rows: Sequence[Tensor], plans: Sequence[DispatchPlan], what: str) -> Pending[list[Tensor]]:
        """`rows` of several plans, alike in width and dtype, in one exchange: those for a rank lie by plan."""
        if self.transport.world_size == 1:
            return Done(list(rows))
        split = [torch.split(rows_SX, plan.send_counts) for rows_SX, plan in zip(rows, plans, strict=True)]
        rows_SX = torch.cat([piece for pieces in zip(*split, strict=True) for piece in pieces])
        sends = [sum(counts) for counts in zip(*(plan.send_counts for plan in plans), strict=True)]
        lengths_WC = list(zip(*(plan.recv_counts for plan in plans), strict=True))
        receives, phase = [sum(lengths) for lengths in lengths_WC], self.phase(what, plans[0].step)
        arriving = self.transport.all_to_all_rows(rows_SX, sends, receives, phase)

        def finish() -> list[Tensor]:
            pieces = torch.split(arriving.wait(), list(chain.from_iterable(lengths_WC)))
            return [torch.cat(pieces[number :: len(plans)]) for number in range(len(plans))]

        return Then(finish)

    def back(self, out_RD: Tensor, plan: DispatchPlan, anchor: Tensor | None = None) -> Pending[Tensor]:
        """Rows by slot -> rows in send order on the ranks they came from.

        A gradient for `anchor` too, which gets none, makes the backward run here: ranks must not differ in that, and
        those with no rows may hold an out_RD without history.
        """
        returning = self.returned(out_RD.detach(), plan, "combine")
        if not need_gradient(out_RD, anchor):
            return returning
        return Then(lambda: _Returned.apply(out_RD, anchor, self, plan, returning))  # type: ignore[no-untyped-call]

    def returned(self, out_RD: Tensor, plan: DispatchPlan, what: str) -> Pending[Tensor]:
        """`back`, not differentiable."""
        if self.transport.world_size == 1:
            return Done(out_RD if plan.restore_R is None else out_RD.index_select(0, plan.restore_R))
        rows_RD = out_RD if plan.restore_R is None else out_RD.index_select(0, plan.restore_R)
        phase = self.phase(what, plan.step)
        return self.transport.all_to_all_rows(rows_RD, plan.recv_counts, plan.send_counts, phase)

    def followed(self, x_TD: Tensor, arrived: Tensor, plan: DispatchPlan, what: str) -> Tensor:
        """What has arrived by slot, as a differentiable function of x where x needs a gradient."""
        return self.tracked(x_TD, Done(arrived), plan, what) if need_gradient(x_TD) else arrived

    def tracked(self, x_TD: Tensor, by_slot_R: Pending[Tensor], plan: DispatchPlan, what: str = "dispatch") -> Tensor:
        """What `tokens` brought, by slot and in x's dtype, as a differentiable function of x."""
        rows_RD: Tensor = _Sent.apply(x_TD, self, plan, what, by_slot_R)  # type: ignore[no-untyped-call]
        return rows_RD


def by_slot(arrived: Tensor, plan: DispatchPlan) -> Tensor:
    """What `tokens` brought, in the order by slot."""
    return arrived if plan.order_R is None else arrived.index_select(0, plan.order_R)


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, lane: Lane, plan: DispatchPlan, what: str, arriving: Pending[Tensor]) -> Tensor:
        ctx.lane, ctx.plan, ctx.phase = lane, plan, f"backward of {what}"
        arrived = arriving.wait()
        return arrived.view_as(arrived)  # what has come once may be followed more than once

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RD: Tensor) -> tuple[Tensor, None, None, None, None]:
        lane, plan = ctx.lane, ctx.plan
        back_SD = lane.returned(drows_RD, plan, ctx.phase).wait()
        dx_TD = weighted_sum(back_SD, None, plan.outgoing.position_TK, None, lane.backend)
        return dx_TD, None, None, None, None


class _Returned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out_RD: Tensor,
        anchor: Tensor | None,
        lane: Lane,
        plan: DispatchPlan,
        returning: Pending[Tensor],
    ) -> Tensor:
        ctx.lane, ctx.plan = lane, plan
        back_SD = returning.wait()
        return back_SD.view_as(back_SD)  # where nothing travelled, they are out_RD's own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dback_SD: Tensor) -> tuple[Tensor, None, None, None, None]:
        arrived = ctx.lane.rows(dback_SD, ctx.plan, "backward of combine").wait()
        arrange_R = ctx.plan.arrange_R
        dout_RD = arrived if arrange_R is None else arrived.index_select(0, arrange_R)
        return dout_RD, None, None, None, None
