"""`Dispatcher`: rows to the ranks that hold their experts (dispatch), results back and summed (combine).

Legend: T tokens here, D hidden, K experts per token, P slots, L slots a rank, S rows sent, R rows received.

    x_TD --dispatch--> rows_RD by (slot, source rank, token, k) --experts--> out_RD --combine--> y_TD

combine adds a token's K results in the order of k, in float32, whatever rank they come from: that, and an exchange that
moves bytes, is why the result does not depend on the number of ranks. The backward of dispatch is combine with weights
of one, and that of combine is dispatch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.backend import Backend, resolve_backend
from crossdock.comm.combine_kernel import weighted_sum_ref, weighted_sum_triton
from crossdock.comm.plan import DispatchPlan, check_slots, complete_plan, plan_on_device, plan_outgoing
from crossdock.comm.transport import Done, Pending, Then, Transport
from crossdock.errors import ConfigError, PlanMismatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADER = ("layer", "exchange", "slots", "hidden size", "dtype", "experts per token")


@dataclass(frozen=True)
class Inbound:
    """Rows received, [R, D]; slot l's are rows ends_L[l - 1] to ends_L[l] (int32 [L]).

    Where row_ids_R (int32) is given, rows_RD are this rank's own tokens, and row r of that order is
    rows_RD[row_ids_R[r]].
    """

    rows_RD: Tensor
    ends_L: Tensor
    plan: DispatchPlan
    row_ids_R: Tensor | None = None


class Dispatcher:
    """The exchange of one MoE layer: P slots over the transport's ranks, rows of `hidden_size` values of `dtype`.

    All ranks make their dispatchers in the same order and call each one's methods together; those that differ in layer,
    step, slots, row width, dtype or K are named by PlanMismatch before any row moves. Raises ConfigError where P does
    not divide over the ranks.
    """

    def __init__(
        self,
        transport: Transport,
        num_slots: int,
        hidden_size: int,
        dtype: torch.dtype,
        backend: Backend = "auto",
    ) -> None:
        if num_slots < 1 or num_slots % transport.world_size:
            raise ConfigError(f"{num_slots} slots do not divide over {transport.world_size} ranks")
        if dtype not in DTYPES or hidden_size < 1:
            found = f"{hidden_size} values of {dtype}"
            raise ConfigError(f"rows can be at least one value of {', '.join(map(str, DTYPES))}, found {found}")
        self.transport, self.num_slots, self.hidden_size, self.dtype = transport, num_slots, hidden_size, dtype
        self.backend: Backend = backend
        self.layer = transport.register()
        self.step = 0

    def plan(self, slot_ids_TK: Tensor, checked: bool = False) -> DispatchPlan:
        """Where each (token, k) goes, from slot ids int64 [T, K] in 0..P-1 or -1 for no expert; T may differ by rank.

        In a world of one, on the triton backend and without gradients, the plan is made on the device, the host does
        not wait for it, and an id out of range is no expert, unless `checked`. Otherwise ConfigError is raised for one.
        Raises PlanMismatch where ranks are not in the same exchange.
        """
        if slot_ids_TK.dim() != 2 or slot_ids_TK.dtype != torch.int64 or slot_ids_TK.shape[1] < 1:
            found = f"{slot_ids_TK.dtype} {tuple(slot_ids_TK.shape)}"
            raise ConfigError(f"slot_ids must be int64 [T, K] with K at least 1, found {found}")
        transport = self.transport
        if transport.world_size == 1 and not torch.is_grad_enabled() and self._on_triton(slot_ids_TK):
            if checked:
                check_slots(slot_ids_TK, self.num_slots)
            self.step += 1
            return plan_on_device(slot_ids_TK, self.num_slots, self.step)
        outgoing = plan_outgoing(slot_ids_TK, self.num_slots)
        self.step += 1
        if transport.world_size == 1:
            return complete_plan(outgoing, [outgoing.counts_P], 0, self.step)
        header = [
            self.layer,
            self.step,
            self.num_slots,
            self.hidden_size,
            DTYPES.index(self.dtype),
            slot_ids_TK.shape[1],
        ]
        if self.step == 1:  # slots may differ only before the first plan, and so may the length of what is gathered
            self._agree(transport.all_gather(header, self._phase("plan")))
        gathered = transport.all_gather(header + outgoing.counts_P, self._phase("plan"))
        self._agree([values[: len(HEADER)] for values in gathered])
        return complete_plan(outgoing, [values[len(HEADER) :] for values in gathered], transport.rank, self.step)

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Inbound:
        """Sends x[t] to each slot chosen for t. Differentiable. Raises ConfigError for another shape or dtype."""
        return self.dispatch_async(x_TD, plan).wait()

    def dispatch_async(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Inbound]:
        """The same, started: other work can run before `wait`."""
        tokens, top_k = plan.outgoing.position_TK.shape
        self._check("x_TD", x_TD, tokens)
        self._check_device_plan(plan, _need_gradient(x_TD))
        if plan.token_R is not None:
            return Done(Inbound(x_TD, plan.ends_L, plan, plan.token_R))
        rows_SD = x_TD.detach().index_select(0, plan.outgoing.order_S.div(top_k, rounding_mode="floor"))
        arriving = self._send(rows_SD, plan, "dispatch")
        if not _need_gradient(x_TD):
            if isinstance(arriving, Done):
                return Done(Inbound(arriving.value, plan.ends_L, plan))
            return Then(lambda: Inbound(arriving.wait(), plan.ends_L, plan))
        return Then(lambda: Inbound(_Dispatched.apply(x_TD, self, plan, arriving), plan.ends_L, plan))  # type: ignore[no-untyped-call]

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
        self._check("out_RD", out_RD, sum(plan.recv_counts))
        if weights_TK.shape != plan.outgoing.position_TK.shape:
            expected = tuple(plan.outgoing.position_TK.shape)
            raise ConfigError(f"weights_TK must have shape {expected}, found {tuple(weights_TK.shape)}")
        if plus_TD is not None:
            self._check("plus_TD", plus_TD, len(weights_TK))
        for name, tensor in (("weights_TK", weights_TK), ("plus_TD", plus_TD)):
            if tensor is not None and tensor.device != out_RD.device:
                raise ConfigError(f"{name} is on {tensor.device}, but out_RD is on {out_RD.device}")
        if not weights_TK.dtype.is_floating_point:
            raise ConfigError(f"weights_TK must be of a floating dtype, found {weights_TK.dtype}")
        wanted = _need_gradient(out_RD, weights_TK, plus_TD)
        self._check_device_plan(plan, wanted)
        returning = self._return(out_RD.detach(), plan, "combine")
        if wanted:

            def combined() -> Tensor:
                y_TD: Tensor = _Combined.apply(out_RD, weights_TK, self, plan, returning)  # type: ignore[no-untyped-call]
                return y_TD if plus_TD is None else y_TD + plus_TD

            return Then(combined)
        if isinstance(returning, Done):
            return Done(self._sum(returning.value, weights_TK, plan, plus_TD))
        return Then(lambda: self._sum(returning.wait(), weights_TK, plan, plus_TD))

    def _sum(
        self, back_SD: Tensor, weights_TK: Tensor | None, plan: DispatchPlan, plus_TD: Tensor | None = None
    ) -> Tensor:
        """Rows in send order -> [T, D]: K products a token (weights of one where None), added in order of k."""
        on_triton = back_SD.dtype != torch.float64 and self._on_triton(back_SD)
        weighted_sum = weighted_sum_triton if on_triton else weighted_sum_ref
        return weighted_sum(back_SD, weights_TK, plan.outgoing.position_TK, plus_TD)

    def _on_triton(self, tensor: Tensor) -> bool:
        return resolve_backend(self.backend, tensor.device) == "triton"

    def _send(self, rows_SD: Tensor, plan: DispatchPlan, phase: str) -> Pending[Tensor]:
        """Rows in send order -> rows by slot on the ranks that hold them."""
        if self.transport.world_size == 1:
            return Done(rows_SD)
        arriving = self.transport.all_to_all_rows(rows_SD, plan.send_counts, plan.recv_counts, self._phase(phase))
        assert plan.arrange_R is not None
        arrange_R = plan.arrange_R
        return Then(lambda: arriving.wait().index_select(0, arrange_R))

    def _return(self, out_RD: Tensor, plan: DispatchPlan, phase: str) -> Pending[Tensor]:
        """Rows by slot -> rows in send order on the ranks they came from."""
        if plan.restore_R is None:
            return Done(out_RD)
        rows_RD = out_RD.index_select(0, plan.restore_R)
        return self.transport.all_to_all_rows(rows_RD, plan.recv_counts, plan.send_counts, self._phase(phase))

    def _check_device_plan(self, plan: DispatchPlan, wanted: bool) -> None:
        if wanted and plan.token_R is not None:
            raise ConfigError("the plan was made without gradients, but one is wanted: make it where they are enabled")

    def _phase(self, phase: str) -> str:
        return f"{phase} of exchange {self.step} in MoE layer {self.layer}"

    def _check(self, name: str, rows: Tensor, count: int) -> None:
        if rows.shape != (count, self.hidden_size) or rows.dtype != self.dtype:
            found = f"{rows.dtype} {list(rows.shape)}"
            raise ConfigError(f"{name} must be {self.dtype} {[count, self.hidden_size]}, found {found}")

    def _agree(self, headers: list[list[int]]) -> None:
        own = headers[self.transport.rank]
        for rank, header in enumerate(headers):
            for name, theirs, mine in zip(HEADER, header, own, strict=True):
                if theirs != mine:
                    where = f"rank {self.transport.rank}: {self._phase('plan')}"
                    found, expected = _shown(name, theirs), _shown(name, mine)
                    raise PlanMismatch(f"{where}: {name} is {found} on rank {rank}, expected {expected} as here")


def _need_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _shown(name: str, value: int) -> str:
    return str(DTYPES[value]) if name == "dtype" and value in range(len(DTYPES)) else str(value)


class _Dispatched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, dispatcher: Dispatcher, plan: DispatchPlan, arriving: Pending[Tensor]
    ) -> Tensor:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        return arriving.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RD: Tensor) -> tuple[Tensor, None, None, None]:
        back_SD = ctx.dispatcher._return(drows_RD, ctx.plan, "backward of dispatch").wait()
        return ctx.dispatcher._sum(back_SD, None, ctx.plan), None, None, None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out_RD: Tensor,
        weights_TK: Tensor,
        dispatcher: Dispatcher,
        plan: DispatchPlan,
        returning: Pending[Tensor],
    ) -> Tensor:
        back_SD = returning.wait()
        ctx.save_for_backward(back_SD, weights_TK)
        ctx.dispatcher, ctx.plan = dispatcher, plan
        return dispatcher._sum(back_SD, weights_TK, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        back_SD, weights_TK = ctx.saved_tensors
        order_S = ctx.plan.outgoing.order_S
        wide = torch.promote_types(back_SD.dtype, torch.float32)
        dy_SD = dy_TD.index_select(0, order_S.div(weights_TK.shape[1], rounding_mode="floor")).to(wide)
        weights_S = weights_TK.reshape(-1).index_select(0, order_S).to(wide)
        sending = ctx.dispatcher._send((dy_SD * weights_S[:, None]).to(back_SD.dtype), ctx.plan, "backward of combine")
        dweights_S = (dy_SD * back_SD.to(wide)).sum(-1).to(weights_TK.dtype)
        dweights_TK = torch.zeros_like(weights_TK).reshape(-1).index_copy_(0, order_S, dweights_S)
        return sending.wait(), dweights_TK.view(weights_TK.shape), None, None, None
