"""`DispatchPlan`: where each (token, k) row goes and comes from; a pure function of slot ids and gathered counts.

Legend: T tokens here, K experts per token, P slots, W ranks, L slots a rank, S rows sent, R rows received.

Three tokens, K = 2, W = 2 ranks of L = 2 slots; rank 0 sends its rows in the order of (slot, token, k):

    slot_ids_TK   0 2 | 3 0 | 2 -1       (token 2's second choice is no expert)
    sent          t0k0 t1k1 | t0k1 t2k0 t1k0        to rank 0: slots 0 0   to rank 1: slots 2 2 3

What arrives from each source is in that order too; `arrange_R` makes it (slot, source rank, token, k), so that each
slot's rows lie together and in an order no timing can change.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from crossdock.comm.plan_kernel import place_rows_triton
from crossdock.errors import ConfigError


@dataclass(frozen=True)
class Outgoing:
    """This rank's half: order_S int64, t * K + k of each row sent; position_TK int64, its place there (S for -1)."""

    order_S: Tensor
    position_TK: Tensor
    counts_P: list[int]


@dataclass(frozen=True)
class DispatchPlan:
    """send_counts and recv_counts are rows by rank; ends_L int32, where each local slot's rows end.

    arrange_R and restore_R (int64) turn rows by source into rows by slot and back; None where they are the same.
    `step` counts this dispatcher's exchanges. token_R (int32) is there for a plan that was made on the device and never
    leaves it: row r is token token_R[r]'s, nothing is copied to be sent, and only ends_L knows how many rows there are,
    at most R = T * K.
    """

    outgoing: Outgoing
    send_counts: list[int]
    recv_counts: list[int]
    ends_L: Tensor
    arrange_R: Tensor | None
    restore_R: Tensor | None
    step: int
    token_R: Tensor | None = None


def check_slots(slot_ids_TK: Tensor, num_slots: int) -> None:
    """Raises ConfigError for an id outside -1..P-1; waits for the device."""
    if slot_ids_TK.numel():
        lowest, highest = int(slot_ids_TK.min()), int(slot_ids_TK.max())
        if lowest < -1 or highest >= num_slots:
            found = lowest if lowest < -1 else highest
            raise ConfigError(f"slot_ids must be in -1..{num_slots - 1}, found {found}")


def plan_outgoing(slot_ids_TK: Tensor, num_slots: int) -> Outgoing:
    """Orders this rank's rows. Raises ConfigError for an id outside -1..P-1.

    In numpy: counts have to reach the host anyway, and for the few rows of decoding a numpy call costs a third of a
    torch call.
    """
    flat_N = slot_ids_TK.reshape(-1).cpu().numpy()
    count = len(flat_N)
    order_N = flat_N.argsort(kind="stable")
    lowest, highest = (flat_N[order_N[0]], flat_N[order_N[-1]]) if count else (0, 0)
    if lowest < -1 or highest >= num_slots:
        raise ConfigError(f"slot_ids must be in -1..{num_slots - 1}, found {lowest if lowest < -1 else highest}")
    none, *counts_P = np.bincount(flat_N + 1, minlength=num_slots + 1).tolist()
    position_N = np.empty_like(order_N)
    position_N[order_N[none:]] = np.arange(count - none)
    position_N[order_N[:none]] = count - none
    device = slot_ids_TK.device
    order_S, position_TK = torch.from_numpy(order_N[none:]), torch.from_numpy(position_N).view(slot_ids_TK.shape)
    return Outgoing(order_S.to(device), position_TK.to(device), counts_P)


def plan_on_device(slot_ids_TK: Tensor, num_slots: int, step: int) -> DispatchPlan:
    """The plan of a rank that holds all slots, in one kernel, int32; ids are not checked: that would wait for it."""
    order_N, token_N, position_TK, ends_P = place_rows_triton(slot_ids_TK, num_slots)
    rows = [slot_ids_TK.numel()]
    return DispatchPlan(Outgoing(order_N, position_TK, []), rows, rows, ends_P, None, None, step, token_N)


def complete_plan(outgoing: Outgoing, counts_WP: list[list[int]], rank: int, step: int) -> DispatchPlan:
    """What rank `rank` sends and receives, from every rank's count of rows for every slot."""
    world_size, num_slots = len(counts_WP), len(outgoing.counts_P)
    per_rank = num_slots // world_size
    device = outgoing.order_S.device
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    if world_size == 1:
        ends_L = torch.tensor(list(accumulate(outgoing.counts_P)), dtype=torch.int32, device=device)
        rows = [len(outgoing.order_S)]
        return DispatchPlan(outgoing, rows, rows, ends_L, None, None, step)
    send_counts = [sum(outgoing.counts_P[r * per_rank : (r + 1) * per_rank]) for r in range(world_size)]
    counts_WL = torch.tensor([counts[mine] for counts in counts_WP]).view(world_size, per_rank)
    recv_counts: list[int] = counts_WL.sum(1).tolist()
    ends_L = counts_WL.sum(0).cumsum(0).to(torch.int32)
    arrange_R = _by_slot(counts_WL)
    restore_R = torch.empty_like(arrange_R).scatter_(0, arrange_R, torch.arange(len(arrange_R)))
    return DispatchPlan(
        outgoing, send_counts, recv_counts, ends_L.to(device), arrange_R.to(device), restore_R.to(device), step
    )


def _by_slot(counts_WL: Tensor) -> Tensor:
    """For rows that lie by (source, slot): the index that reads them by (slot, source)."""
    lengths_WL = counts_WL.reshape(-1)
    starts_WL = (lengths_WL.cumsum(0) - lengths_WL).view(counts_WL.shape)
    lengths_LW = counts_WL.t().reshape(-1)
    begins_LW = lengths_LW.cumsum(0) - lengths_LW
    shift_LW = starts_WL.t().reshape(-1) - begins_LW
    return torch.repeat_interleave(shift_LW, lengths_LW) + torch.arange(int(lengths_LW.sum()))
