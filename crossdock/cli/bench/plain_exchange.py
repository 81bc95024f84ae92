"""The plain form of the exchange, which ours is measured against: a row for each (token, k) by `all_to_all_single`.

Counts first, then rows sorted by slot; the receiver puts them in order by slot, and results go back the same way and
are added up. Rows travel as they are, in the layer's dtype. Nothing is copied that need not be, and what is done on a
rank is done as fast as in the package: the weighted sum is the package's own.

Legend: T tokens, D hidden, K experts per token, S rows sent, R rows received, L slots a rank, W ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.comm.combine import weighted_sum


@dataclass(frozen=True)
class Trip:
    """What it takes to send results back.

    order_S is t * K + k of each row sent; arrange_R reads rows by source in the order by slot; both int64. Counts are
    rows by rank. ends_L (int32) is where each slot's rows end.
    """

    ends_L: Tensor
    order_S: Tensor
    arrange_R: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    group: dist.ProcessGroup


def plain_dispatch(
    x_TD: Tensor, slot_ids_TK: Tensor, slots_per_rank: int, group: dist.ProcessGroup
) -> tuple[Tensor, Trip]:
    """x[t] to each slot chosen for t (all in range): rows [R, D] by slot."""
    world_size, top_k, device = group.size(), slot_ids_TK.shape[1], x_TD.device
    flat_S = slot_ids_TK.reshape(-1)
    order_S = flat_S.argsort(stable=True)
    counts_WL = flat_S.bincount(minlength=world_size * slots_per_rank).view(world_size, slots_per_rank)
    theirs_WL = torch.empty_like(counts_WL)
    dist.all_to_all_single(theirs_WL, counts_WL, group=group)
    send_counts, recv_counts = counts_WL.sum(1).tolist(), theirs_WL.sum(1).tolist()
    rows_SD = x_TD.index_select(0, order_S.div(top_k, rounding_mode="floor"))
    arrived_RD = x_TD.new_empty(sum(recv_counts), x_TD.shape[1])
    dist.all_to_all_single(arrived_RD, rows_SD, recv_counts, send_counts, group=group)
    del rows_SD
    slot_R = torch.arange(slots_per_rank, device=device).repeat(world_size).repeat_interleave(theirs_WL.reshape(-1))
    arrange_R = slot_R.argsort(stable=True)
    ends_L = theirs_WL.sum(0).cumsum(0).to(torch.int32)
    trip = Trip(ends_L, order_S, arrange_R, send_counts, recv_counts, group)
    return arrived_RD.index_select(0, arrange_R), trip


def plain_combine(out_RD: Tensor, weights_TK: Tensor, trip: Trip) -> Tensor:
    """y[t] = sum over k of weights[t, k] * (the result of t's k-th slot), [T, D]."""
    back_RD = out_RD.index_select(0, _inverse(trip.arrange_R))
    back_SD = out_RD.new_empty(len(trip.order_S), out_RD.shape[1])
    dist.all_to_all_single(back_SD, back_RD, trip.send_counts, trip.recv_counts, group=trip.group)
    del back_RD
    return weighted_sum(back_SD, weights_TK, _inverse(trip.order_S).view(weights_TK.shape), None, "auto")


def _inverse(order_N: Tensor) -> Tensor:
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
