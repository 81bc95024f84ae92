"""`Dispatcher`: rows to the ranks that hold their experts (dispatch), results back and summed (combine).

Legend: T tokens here, D hidden, K experts per token, P slots, L slots a rank, S rows sent, R rows received.

    x_TD --dispatch--> rows_RD by (slot, source rank, token, k) --experts--> out_RD --combine--> y_TD

combine adds a token's K results in the order of k, in float32, whatever rank they come from: that, and an exchange that
moves bytes, is why the result does not depend on the number of ranks. The backward of dispatch is combine with weights
of one, and that of combine is dispatch.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.comm.agreement import gather_agreed
from crossdock.comm.codec import Codec
from crossdock.comm.combine import need_gradient, weigh
from crossdock.comm.form import ExchangeForm
from crossdock.comm.inbound import Inbound, receive
from crossdock.comm.lane import Lane
from crossdock.comm.once import Planned, is_worth_it, with_once
from crossdock.comm.plan import (
    DispatchPlan,
    Outgoing,
    Wanted,
    check_form,
    check_parts_alike,
    check_slots,
    complete_plan,
    plan_on_device,
    plan_once,
    plan_outgoing,
)
from crossdock.comm.transport import Done, Pending, Then, Transport
from crossdock.errors import ConfigError


class Dispatcher(ExchangeForm):
    """The exchange of one MoE layer: P slots over the transport's ranks, rows of `hidden_size` values of `dtype`.

    With a `codec`, dispatched rows travel encoded. All ranks make their dispatchers in the same order and call each
    one's methods together; those that differ in layer, step, slots, row width, dtype or K are named by PlanMismatch
    before any row moves. Raises ConfigError where P does not divide over the ranks.
    """

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
        self.lane = Lane(transport, self.layer, backend)

    def plan(self, slot_ids_TK: Tensor, weights_TK: Tensor | None = None, *, checked: bool = False) -> DispatchPlan:
        """Where each (token, k) goes, from slot ids int64 [T, K] in 0..P-1 or -1 for no expert; T may differ by rank.

        In a world of one, on the triton backend and without gradients, the plan is made on the device, the host does
        not wait for it, and an id out of range is no expert, unless `checked`. Otherwise ConfigError is raised for one.
        Raises PlanMismatch where ranks are not in the same exchange. Weights have no use here, only where sums are
        remote.
        """
        return self.plans([slot_ids_TK], checked=checked)[0]

    def plans(
        self, parts: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, checked: bool = False
    ) -> list[DispatchPlan]:
        """`plan` of several exchanges, equally many on all ranks, with one gather of counts."""
        if self.transport.world_size == 1:
            return [self._plan_alone(slot_ids_TK, checked) for slot_ids_TK in parts]
        check_parts_alike(parts)
        outgoing = [plan_outgoing(slot_ids_TK, self.num_slots) for slot_ids_TK in parts]
        wanted = [plan_once(going, self.transport.world_size) for going in outgoing]
        step, phase = self.step + 1, self.lane.phase("plan", self.step + 1)
        self.step += len(parts)
        header = self.header(parts[0].shape[1], len(parts))
        if step == 1:  # slots may differ only before the first plan, and so may the length of what is gathered
            gather_agreed(self.transport, header, [], phase)
        rank = self.transport.rank
        counts = [
            [*going.counts_P, *want.counts_W, int(want.saved_W.sum() - want.saved_W[rank])]
            for going, want in zip(outgoing, wanted, strict=True)
        ]
        gathered = gather_agreed(self.transport, header, list(chain.from_iterable(counts)), phase)
        length = len(counts[0])
        planned = []
        for number, (going, want) in enumerate(zip(outgoing, wanted, strict=True)):
            of_part = [values[number * length : (number + 1) * length] for values in gathered]
            planned.append(self._complete(going, want, of_part, step + number))
        return with_once(planned, self.lane)

    def _plan_alone(self, slot_ids_TK: Tensor, checked: bool) -> DispatchPlan:
        check_form(slot_ids_TK)
        self.step += 1
        if not torch.is_grad_enabled() and resolve_backend(self.backend, slot_ids_TK.device) == "triton":
            if checked:
                check_slots(slot_ids_TK.cpu().numpy(), self.num_slots)
            return plan_on_device(slot_ids_TK, self.num_slots, self.step, self.sender)
        outgoing = plan_outgoing(slot_ids_TK, self.num_slots)
        return complete_plan(outgoing, [outgoing.counts_P], 0, self.step, self.sender)

    def _complete(self, outgoing: Outgoing, wanted: Wanted, gathered: list[list[int]], step: int) -> Planned:
        """One exchange's plan, from its counts of every rank."""
        rank, slots = self.transport.rank, self.num_slots
        plan = complete_plan(outgoing, [values[:slots] for values in gathered], rank, step, self.sender)
        if not is_worth_it(sum(values[-1] for values in gathered), self.transport.world_size, self.row_bytes):
            return Planned(plan)
        return Planned(plan, wanted, tuple(values[slots + rank] for values in gathered))

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Inbound:
        """Sends x[t] to each slot chosen for t. Differentiable. Raises ConfigError for another shape or dtype."""
        return self.dispatch_async(x_TD, plan).wait()

    def dispatch_async(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Inbound]:
        """The same, started: other work can run before `wait`."""
        self.check_rows("x_TD", x_TD, len(plan.outgoing.position_TK))
        wanted = need_gradient(x_TD)
        _check_device_plan(plan, wanted)
        wire_TX = self.encoded(x_TD)
        if plan.token_R is not None:
            inbound = Inbound(wire_TX, plan.ends_L, plan, plan.token_R, self.codec, self.dtype)
            return Done(inbound.decoded() if self.codec is not None and self.codec.decode_on_arrival else inbound)
        arriving = self.lane.tokens(wire_TX, plan)
        if isinstance(arriving, Done) and not wanted:
            return Done(receive(x_TD, arriving, self.lane, plan, self.codec))
        return Then(lambda: receive(x_TD, arriving, self.lane, plan, self.codec))

    def combine(self, out_RD: Tensor, weights_TK: Tensor, inbound: Inbound, plus_TD: Tensor | None = None) -> Tensor:
        """y[t] = sum over k of weights[t, k] * (the result of t's k-th slot) (+ plus[t]) -> [T, D] in out's dtype.

        The sum is float32 inside and rounded before `plus_TD`, in out's dtype, is added. out_RD stands in the order of
        the inbound rows. Choices of -1 add nothing. Differentiable in all three.
        """
        return self.combine_async(out_RD, weights_TK, inbound, plus_TD).wait()

    def combine_async(
        self, out_RD: Tensor, weights_TK: Tensor, inbound: Inbound, plus_TD: Tensor | None = None
    ) -> Pending[Tensor]:
        """The same, started: other work can run before `wait`."""
        plan = inbound.plan
        if not isinstance(plan, DispatchPlan):
            raise ConfigError("combine must get what this form of the exchange dispatched, found rows of another form")
        expected = tuple(plan.outgoing.position_TK.shape)
        self.check_combine(out_RD, sum(plan.recv_counts), weights_TK, expected, plus_TD)
        _check_device_plan(plan, need_gradient(out_RD, weights_TK, plus_TD))
        returning = self.lane.back(out_RD, plan, weights_TK)
        if isinstance(returning, Done):
            return Done(weigh(returning.value, weights_TK, plan.outgoing, plus_TD, self.backend))
        return Then(lambda: weigh(returning.wait(), weights_TK, plan.outgoing, plus_TD, self.backend))


def _check_device_plan(plan: DispatchPlan, wanted: bool) -> None:
    if wanted and plan.token_R is not None:
        raise ConfigError("the plan was made without gradients, but one is wanted: make it where they are enabled")
