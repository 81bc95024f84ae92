"""`Inbound`: what dispatch hands to the experts, and combine gets back beside their results.

Legend: R rows by slot, U rows in memory, D hidden, X bytes of an encoded row, L slots on this rank.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossdock.comm.codec import Codec
from crossdock.comm.combine import need_gradient
from crossdock.comm.lane import Lane, by_slot
from crossdock.comm.node_plan import NodePlan
from crossdock.comm.plan import DispatchPlan
from crossdock.comm.transport import Pending, Then


@dataclass(frozen=True)
class Inbound:
    """Rows received, [R, D]; slot l's are rows ends_L[l - 1] to ends_L[l] (int32 [L]).

    Where row_ids_R is given, row r of that order is rows_RD[row_ids_R[r]] (a row may stand in several places), and as
    many rows as ends_L says are in use. Where codec is given, rows_RD are encoded, uint8 [U, X], as they came from the
    wire: `decoded` takes them to `dtype`.
    """

    rows_RD: Tensor
    ends_L: Tensor
    plan: DispatchPlan | NodePlan
    row_ids_R: Tensor | None = None
    codec: Codec | None = None
    dtype: torch.dtype | None = None

    def decoded(self) -> "Inbound":
        """The same rows in the layer's dtype, each decoded once, wherever they stand."""
        if self.codec is None or self.dtype is None:
            return self
        return replace(self, rows_RD=self.codec.decode(self.rows_RD, self.dtype), codec=None)

    @property
    def rows(self) -> int:
        """R, or where the device alone knows it the most it can be."""
        return len(self.rows_RD if self.row_ids_R is None else self.row_ids_R)

    def part(self, first: int, end: int) -> "Inbound":
        """Rows `first` to `end` of the order by slot; a slot may have none."""
        ends_L = self.ends_L.clamp(first, end) - first
        if self.row_ids_R is not None:
            return replace(self, row_ids_R=self.row_ids_R[first:end], ends_L=ends_L)
        return replace(self, rows_RD=self.rows_RD[first:end], ends_L=ends_L)

    def in_order(self) -> "Inbound":
        """The same with every row in its place, for experts that do not gather."""
        if self.row_ids_R is None:
            return self
        return replace(self, rows_RD=self.rows_RD.index_select(0, self.row_ids_R), row_ids_R=None)


def receive(x_TD: Tensor, arriving: Pending[Tensor], lane: Lane, plan: DispatchPlan, codec: Codec | None) -> Inbound:
    """What `lane.tokens` brings, waited for; with gradients a function of x_TD, and decoded as the codec says."""
    dtype = x_TD.dtype
    if need_gradient(x_TD):
        decoded = Then(lambda: by_slot(decode(arriving.wait(), codec, dtype), plan))
        return Inbound(lane.tracked(x_TD, decoded, plan), plan.ends_L, plan)
    if codec is not None and not codec.decode_on_arrival:
        return Inbound(arriving.wait(), plan.ends_L, plan, plan.order_R, codec, dtype)
    return Inbound(by_slot(decode(arriving.wait(), codec, dtype), plan), plan.ends_L, plan)


def decode(rows: Tensor, codec: Codec | None, dtype: torch.dtype) -> Tensor:
    return rows if codec is None else codec.decode(rows, dtype)
