# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator, no-untyped-call"
"""`arrange_rows`: from how many rows each source sent for each slot, where every received row stands in slot order.

Received rows lie by source, each in a region of its own, and stay there. Slot order is (slot, source, token, k). Two
sources, two slots, regions of 4 rows; `.` is no row:

    ends_WL1    0 2 3 | 5 5 8          (which of the source's own rows: 2 and 1 rows; 0 and 3 rows)
    buffer      a a b .   b b b .
    ends_L      2 6                    row_ids_R   0 1 | 2 4 5 6 0 0     rows in slot order, by place in the buffer
    place_R     0 1 2 .   3 4 5 .      the other way
    first_W     0 4    last_W  3 7     places in the buffer that hold rows
    to_W        0 5                    the source's own number of the first

Products gather rows by `row_ids_R`, and results go back by `place_R` and `to_W`, so that nothing is copied in between.
A program a (slot, source) sums up what comes before it, from the cache.

Legend: W ranks, L slots on this rank, R rows of the buffer (W regions of C).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.comm.one_sided import power_of_two

BLOCK = 256  # rows a step


class Arranged(NamedTuple):
    """int32 all; behind the last row row_ids_R is 0, so that all of it can be gathered by; between rows place_R means
    nothing.
    """

    ends_L: Tensor
    row_ids_R: Tensor
    place_R: Tensor
    first_W: Tensor
    last_W: Tensor
    to_W: Tensor


def arrange_rows_ref(ends_WL1: Tensor, status: Tensor, capacity: int) -> Arranged:
    """The specification.

    ends_WL1  int64 [W, L + 1]: of each source, which of its rows are slot 0's first, slot 1's first, ..., and the end
    status    int64 [W + 1, *]: a source whose first word is not 0 sent nothing that counts
    capacity  C, rows from one region to the next
    """
    world = len(ends_WL1)
    counts_WL = ends_WL1.diff(dim=1) * (status[:-1, :1] == 0)
    first_W = torch.arange(world) * capacity
    begins_WL = first_W[:, None] + counts_WL.cumsum(1) - counts_WL
    lengths_LW = counts_WL.t().reshape(-1)
    shift_LW = begins_WL.t().reshape(-1) - (lengths_LW.cumsum(0) - lengths_LW)
    held = torch.repeat_interleave(shift_LW, lengths_LW)
    held += torch.arange(len(held))
    row_ids_R = torch.zeros(world * capacity, dtype=torch.int64)
    row_ids_R[: len(held)] = held
    place_R = torch.zeros_like(row_ids_R)
    place_R[held] = torch.arange(len(held))
    ends_L = counts_WL.sum(0).cumsum(0)
    arranged = ends_L, row_ids_R, place_R, first_W, first_W + counts_WL.sum(1), ends_WL1[:, 0]
    return Arranged(*(tensor.to(torch.int32) for tensor in arranged))


@triton.jit
def arrange_rows_kernel(
    ends_ptr,  # [W, L + 1] int64, rows STRIDE apart
    status_ptr,  # [W + 1, WORDS] int64
    out_ends_ptr,  # [L] int32
    row_ids_ptr,  # [R] int32
    place_ptr,  # [R] int32
    first_ptr,  # [W] int32
    last_ptr,  # [W] int32
    to_ptr,  # [W] int32
    world,
    slots,
    capacity,
    STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    W_BLOCK: tl.constexpr,
    L_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    source = tl.program_id(1)
    w = tl.arange(0, W_BLOCK)[:, None]
    s = tl.arange(0, L_BLOCK)[None, :]
    sent = tl.load(status_ptr + w * WORDS, mask=w < world, other=1) == 0
    there = sent & (w < world) & (s < slots)
    begin_WL = tl.load(ends_ptr + w * STRIDE + s, mask=there, other=0)
    count_WL = (tl.load(ends_ptr + w * STRIDE + s + 1, mask=there, other=0) - begin_WL).to(tl.int32)
    before = tl.sum(tl.where((s < slot) | ((s == slot) & (w < source)), count_WL, 0))
    count = tl.sum(tl.where((s == slot) & (w == source), count_WL, 0))
    row = source * capacity + tl.sum(tl.where((s < slot) & (w == source), count_WL, 0))
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(row_ids_ptr + before + at, row + at, mask=at < count)
        tl.store(place_ptr + row + at, before + at, mask=at < count)
    each = slots * world * BLOCK
    for start in range(tl.sum(count_WL) + (slot * world + source) * BLOCK, world * capacity, each):
        at = start + tl.arange(0, BLOCK)
        tl.store(row_ids_ptr + at, tl.zeros([BLOCK], tl.int32), mask=at < world * capacity)
    if source == world - 1:
        tl.store(out_ends_ptr + slot, before + count)
    if slot == slots - 1:
        tl.store(first_ptr + source, source * capacity)
        tl.store(last_ptr + source, row + count)
        tl.store(to_ptr + source, tl.load(ends_ptr + source * STRIDE).to(tl.int32))


def arrange_rows_triton(ends_WL1: Tensor, status: Tensor, capacity: int) -> Arranged:
    """`arrange_rows_ref` in one launch."""
    world, slots = ends_WL1.shape[0], ends_WL1.shape[1] - 1
    sizes = slots, world * capacity, world * capacity, world, world, world
    arranged = Arranged(*(torch.empty(size, dtype=torch.int32, device=ends_WL1.device) for size in sizes))
    arrange_rows_kernel[(slots, world)](
        ends_WL1,
        status,
        *arranged,
        world,
        slots,
        capacity,
        STRIDE=ends_WL1.stride(0),
        WORDS=status.shape[1],
        W_BLOCK=power_of_two(world),
        L_BLOCK=power_of_two(slots),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return arranged


_INTS = ("out_ends_ptr", "row_ids_ptr", "place_ptr", "first_ptr", "last_ptr", "to_ptr")
_CONSTEXPRS = {"STRIDE": 37, "WORDS": 5, "W_BLOCK": 8, "L_BLOCK": 32, "BLOCK": BLOCK}

AUDIT = [
    KernelSpec(
        name="arrange_rows",
        kernel=arrange_rows_kernel,
        config="8 ranks of 32 slots",
        signature={"ends_ptr": "*i64", "status_ptr": "*i64"}
        | dict.fromkeys(_INTS, "*i32")
        | dict.fromkeys(("world", "slots", "capacity"), "i32")
        | dict.fromkeys(_CONSTEXPRS, "constexpr"),
        constexprs=_CONSTEXPRS,
    )
]
