"""`DispatchPlan`: where each (token, k) row goes and comes from; a pure function of slot ids and gathered counts.

Legend: T tokens here, K experts per token, P slots, W ranks, L slots a rank, S rows sent, R rows received, U rows sent
where a token goes to a rank once.

Three tokens, K = 2, W = 2 ranks of L = 2 slots; rank 0 sends its rows in the order of (slot, token, k):

    slot_ids_TK   0 2 | 3 0 | 2 -1       (token 2's second choice is no expert)
    sent          t0k0 t1k1 | t0k1 t2k0 t1k0        to rank 0: slots 0 0   to rank 1: slots 2 2 3

What arrives from each source is in that order too; `arrange_R` makes it (slot, source rank, token, k), so that each
slot's rows lie together and in an order no timing can change.

A token with several experts on one rank would travel there several times. Where that is much, it goes once, and
integers say which of the rows arrived stands in each place (`OnceEach`). Results still return one a (token, k): their
sum in the order of k is the token's own rank's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock.comm.explain import Sender, Traffic, hop, plain_hops
from crossdock.comm.plan_kernel import place_rows_triton
from crossdock.errors import ConfigError

Integers = npt.NDArray[np.int64]
DENSE = 16  # (rank, token) pairs for each row, above which it is faster to sort rows than to mark pairs


@dataclass(frozen=True)
class Outgoing:
    """This rank's half: order_S, t * K + k of each row sent; position_TK, its place there (S for -1); both int64, or
    int32 where they were made on the device. counts_P: rows for each slot, where these are asked for."""

    order_S: Tensor
    position_TK: Tensor
    counts_P: list[int]


@dataclass(frozen=True)
class OnceEach:
    """A token goes to each rank that wants it once: token_U (int64) is sent, by (rank, token); None: all, to itself.

    send_counts and recv_counts are those rows by rank; row_ids_R (int64) is which of the rows arrived stands in each
    place of the order by slot.
    """

    token_U: Tensor | None
    send_counts: list[int]
    recv_counts: list[int]
    row_ids_R: Tensor


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
    once: OnceEach | None = None
    sender: Sender | None = None

    def explain(self) -> Traffic:
        """What this rank sends, before and after; of a plan made on the device, it waits for the device."""
        sender, send_counts, recv_counts = self.sender, self.send_counts, self.recv_counts
        if sender is None:
            raise ConfigError("a dispatcher's plans can be explained, this is a part of one")
        if self.token_R is not None:
            send_counts = recv_counts = [int(self.ends_L[-1])]
        sent = send_counts if self.once is None else self.once.send_counts
        after = hop("dispatch", sent, sender, sender.row_bytes), hop("combine", recv_counts, sender, sender.back_bytes)
        return Traffic(plain_hops(sender, send_counts, recv_counts), after)

    @property
    def order_R(self) -> Tensor | None:
        """Which of the rows that dispatch brings stands in each place of the order by slot; None: they are in it."""
        return self.arrange_R if self.once is None else self.once.row_ids_R


def check_slots(slot_ids: Integers, num_slots: int) -> None:
    """Raises ConfigError for an id outside -1..P-1."""
    lowest, highest = (slot_ids.min(), slot_ids.max()) if slot_ids.size else (0, 0)
    if lowest < -1 or highest >= num_slots:
        raise ConfigError(f"slot_ids must be in -1..{num_slots - 1}, found {lowest if lowest < -1 else highest}")


def check_form(slot_ids_TK: Tensor) -> None:
    """Raises ConfigError for another dtype or number of dimensions."""
    if slot_ids_TK.dim() != 2 or slot_ids_TK.dtype != torch.int64 or slot_ids_TK.shape[1] < 1:
        found = f"{slot_ids_TK.dtype} {tuple(slot_ids_TK.shape)}"
        raise ConfigError(f"slot_ids must be int64 [T, K] with K at least 1, found {found}")


def check_parts_alike(parts: Sequence[Tensor]) -> None:
    """`check_form` of each; raises ConfigError, too, where they differ in K."""
    for slot_ids_TK in parts:
        check_form(slot_ids_TK)
    if len({slot_ids_TK.shape[1] for slot_ids_TK in parts}) > 1:
        found = ", ".join(str(slot_ids_TK.shape[1]) for slot_ids_TK in parts)
        raise ConfigError(f"slot_ids of exchanges planned together must have one K, found {found}")


def check_weights(weights_TK: Tensor, expected: tuple[int, ...], beside: Tensor, name: str) -> None:
    """Raises ConfigError for another shape, a dtype that is not floating, or another device than that of `beside`."""
    if not isinstance(weights_TK, Tensor):
        raise ConfigError(f"weights_TK must be a tensor, found {type(weights_TK).__name__}")
    if tuple(weights_TK.shape) != expected:
        raise ConfigError(f"weights_TK must have shape {expected}, found {tuple(weights_TK.shape)}")
    if not weights_TK.dtype.is_floating_point:
        raise ConfigError(f"weights_TK must be of a floating dtype, found {weights_TK.dtype}")
    if weights_TK.device != beside.device:
        raise ConfigError(f"weights_TK is on {weights_TK.device}, but {name} is on {beside.device}")


def plan_outgoing(slot_ids_TK: Tensor, num_slots: int, device: torch.device | None = None) -> Outgoing:
    """Orders this rank's rows, on `device` (the ids' own). Raises ConfigError for an id outside -1..P-1.

    In numpy: counts have to reach the host anyway, and for the few rows of decoding a numpy call costs a third of a
    torch call.
    """
    flat_N = slot_ids_TK.reshape(-1).cpu().numpy()
    check_slots(flat_N, num_slots)
    here_S = (flat_N >= 0).nonzero()[0]  # of what came from other nodes a small part
    slot_S = flat_N if len(here_S) == len(flat_N) else flat_N[here_S]
    order_S = (slot_S.astype(np.int16) if num_slots < 1 << 15 else slot_S).argsort(kind="stable")  # 16 bits: by radix
    if slot_S is not flat_N:
        order_S = here_S[order_S]
    position_N = np.full_like(flat_N, len(order_S))
    position_N[order_S] = np.arange(len(order_S))
    counts_P = np.bincount(slot_S, minlength=num_slots).tolist()
    device = device or slot_ids_TK.device
    position_TK = torch.from_numpy(position_N).view(slot_ids_TK.shape)
    return Outgoing(torch.from_numpy(order_S).to(device), position_TK.to(device), counts_P)


def plan_on_device(slot_ids_TK: Tensor, num_slots: int, step: int, sender: Sender | None = None) -> DispatchPlan:
    """The plan of a rank that holds all slots, in one kernel, int32; ids are not checked: that would wait for it."""
    order_N, token_N, position_TK, ends_P = place_rows_triton(slot_ids_TK, num_slots)
    rows = [slot_ids_TK.numel()]
    return DispatchPlan(
        Outgoing(order_N, position_TK, []), rows, rows, ends_P, None, None, step, token_N, sender=sender
    )


def complete_plan(
    outgoing: Outgoing, counts_WP: list[list[int]], rank: int, step: int, sender: Sender | None = None
) -> DispatchPlan:
    """What rank `rank` sends and receives, from every rank's count of rows for every slot."""
    world_size, num_slots = len(counts_WP), len(outgoing.counts_P)
    per_rank = num_slots // world_size
    device = outgoing.order_S.device
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    if world_size == 1:
        ends_L = torch.tensor(list(accumulate(outgoing.counts_P)), dtype=torch.int32, device=device)
        rows, (tokens, top_k) = [len(outgoing.order_S)], outgoing.position_TK.shape
        token_S = outgoing.order_S.div(top_k, rounding_mode="floor")
        once = OnceEach(None, [tokens], [tokens], token_S)
        return DispatchPlan(outgoing, rows, rows, ends_L, None, None, step, once=once, sender=sender)
    send_counts = [sum(outgoing.counts_P[r * per_rank : (r + 1) * per_rank]) for r in range(world_size)]
    counts_WL = np.array([counts[mine] for counts in counts_WP], dtype=np.int64).reshape(world_size, per_rank)
    recv_counts: list[int] = counts_WL.sum(1).tolist()
    ends_L = torch.from_numpy(counts_WL.sum(0).cumsum().astype(np.int32)).to(device)
    if per_rank == 1:  # by source is by (slot, source)
        return DispatchPlan(outgoing, send_counts, recv_counts, ends_L, None, None, step, sender=sender)
    arrange_R = by_slot(counts_WL)
    restore_R = np.empty_like(arrange_R)
    restore_R[arrange_R] = np.arange(len(arrange_R))
    arrange, restore = (torch.from_numpy(index_R).to(device) for index_R in (arrange_R, restore_R))
    return DispatchPlan(outgoing, send_counts, recv_counts, ends_L, arrange, restore, step, sender=sender)


def by_slot(counts_WL: Integers) -> Integers:
    """For rows that lie by (source, slot): the index that reads them by (slot, source)."""
    lengths_WL = counts_WL.reshape(-1)
    starts_WL = (lengths_WL.cumsum() - lengths_WL).reshape(counts_WL.shape)
    lengths_LW = counts_WL.T.reshape(-1)
    begins_LW = lengths_LW.cumsum() - lengths_LW
    shift_LW = starts_WL.T.reshape(-1) - begins_LW
    return np.repeat(shift_LW, lengths_LW) + np.arange(int(lengths_LW.sum()))


@dataclass(frozen=True)
class Wanted:
    """A token's rows to one rank as one: token_U by (rank, token), counts_W of them, and which one each row is.

    index_S int32 numbers a rank's rows from 0. saved_W: how many rows less each rank gets.
    """

    token_U: Integers
    counts_W: list[int]
    index_S: npt.NDArray[np.int32]
    saved_W: Integers


def plan_once(outgoing: Outgoing, world_size: int) -> Wanted:
    """Which tokens each rank wants, whatever number of its slots they chose."""
    tokens, top_k = outgoing.position_TK.shape
    per_rank = len(outgoing.counts_P) // world_size
    rows_W = np.array(outgoing.counts_P, dtype=np.int64).reshape(world_size, per_rank).sum(1)
    token_S = outgoing.order_S.cpu().numpy() // top_k
    cell_S = np.repeat(np.arange(world_size) * tokens, rows_W) + token_S  # (rank, token)
    cells = world_size * tokens
    if cells <= DENSE * len(cell_S):
        occurs = np.zeros(cells, dtype=np.bool_)
        occurs[cell_S] = True
        cell_U, place_S = occurs.nonzero()[0], (occurs.cumsum() - 1)[cell_S]
    else:
        cell_U, place_S = np.unique(cell_S, return_inverse=True)
    rank_U, token_U = np.divmod(cell_U, max(tokens, 1))
    counts_W = np.bincount(rank_U, minlength=world_size)
    index_S = place_S - np.repeat(counts_W.cumsum() - counts_W, rows_W)
    return Wanted(token_U, counts_W.tolist(), index_S.astype(np.int32), rows_W - counts_W)


def once_each(plan: DispatchPlan, wanted: Wanted, recv_counts: list[int], index_R1: Tensor) -> OnceEach:
    """What dispatch needs of it: index_R1 are the other ranks' index_S for this one, by source."""
    index_R = index_R1.squeeze(1).cpu().numpy()
    begins_W = np.cumsum([0, *recv_counts[:-1]])
    row_R = torch.from_numpy(index_R + np.repeat(begins_W, plan.recv_counts))
    device = plan.ends_L.device
    row_ids_R = row_R.to(device) if plan.arrange_R is None else row_R.to(device).index_select(0, plan.arrange_R)
    return OnceEach(torch.from_numpy(wanted.token_U).to(device), wanted.counts_W, recv_counts, row_ids_R)
