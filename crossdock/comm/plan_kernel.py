# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""A plan made on the device, for rows that stay on their rank: the order of rows by slot in one launch.

The host neither takes part nor waits. A program per slot p finds its rows by itself: it counts the choices of lower
slots, which is where its rows begin, and then numbers its own choices in the order of (token, k). Choices of no expert
(-1, and any other id that is no slot) come last, numbered by one program more, so that every index is in range whatever
the choices are:

    slot_ids_TK   2 0 | 0 -1 | 2 1        ends_P   2 3 5
    order_N       1 2 | 5 | 0 4 | 3       token_N  0 1 | 2 | 0 2 | 1       (N = T * K; slots 0, 1, 2, then -1)
    position_TK   3 0 | 1 6 | 4 2         (6 = N: no expert)

Every program reads all choices, P * N of them from the cache. Rejected: tickets from atomic counters (an order that
timing changes), and a sort of (slot, choice) keys (several launches, and a row of N keys does not fit one program).

Legend: T tokens, K experts per token, N choices (T * K), P slots.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton

BLOCK = 1024  # choices a step

Placed = tuple[Tensor, Tensor, Tensor, Tensor]  # order_N, token_N, position_TK, ends_P, all int32


def place_rows_ref(slot_ids_TK: Tensor, num_slots: int) -> Placed:
    """The specification: a stable sort by slot, -1 last."""
    top_k = slot_ids_TK.shape[1]
    slot_N = slot_ids_TK.flatten()
    slot_N = torch.where((slot_N < 0) | (slot_N >= num_slots), num_slots, slot_N)
    order_N = slot_N.argsort(stable=True)
    position_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(slot_N), device=slot_N.device))
    position_N = torch.where(slot_N == num_slots, len(slot_N), position_N)
    ends_P = (slot_N[:, None] == torch.arange(num_slots, device=slot_N.device)).sum(0).cumsum(0)
    token_N = order_N.div(top_k, rounding_mode="floor")
    placed = order_N, token_N, position_N.view(slot_ids_TK.shape), ends_P
    return tuple(tensor.to(torch.int32) for tensor in placed)  # type: ignore[return-value]


@triton.jit
def number_rows(
    slot_ids_ptr,  # [N] int64
    order_ptr,  # [N] int32, or None
    token_ptr,  # [N] int32
    position_ptr,  # [N] int32
    slot,  # P stands for no expert
    N,
    P,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Numbers one slot's rows, behind those of lower slots; where they end."""
    start = 0
    for first in range(0, N, BLOCK):
        at = first + tl.arange(0, BLOCK)
        ids = tl.load(slot_ids_ptr + at, mask=at < N, other=-1)
        start += tl.sum(((ids >= 0) & (ids < slot)).to(tl.int32))
    count = 0
    for first in range(0, N, BLOCK):
        at = first + tl.arange(0, BLOCK)
        ids = tl.load(slot_ids_ptr + at, mask=at < N, other=-1)
        none = (ids < 0) | (ids >= P)
        mine = ((none & (slot == P)) | (~none & (ids == slot))) & (at < N)
        row = start + count + tl.cumsum(mine.to(tl.int32)) - 1
        if order_ptr is not None:
            tl.store(order_ptr + row, at, mask=mine)
        tl.store(token_ptr + row, at // K, mask=mine)
        tl.store(position_ptr + at, tl.where(slot == P, N, row), mask=mine)
        count += tl.sum(mine.to(tl.int32))
    return start + count


@triton.jit
def place_rows_kernel(
    slot_ids_ptr,  # [N] int64
    order_ptr,  # [N] int32
    token_ptr,  # [N] int32
    position_ptr,  # [N] int32
    ends_ptr,  # [P] int32
    N,
    P,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    end = number_rows(slot_ids_ptr, order_ptr, token_ptr, position_ptr, slot, N, P, K, BLOCK)
    tl.store(ends_ptr + slot, end, mask=slot < P)


def place_rows_triton(slot_ids_TK: Tensor, num_slots: int) -> Placed:
    """`place_rows_ref` in one launch."""
    count, top_k = slot_ids_TK.numel(), slot_ids_TK.shape[1]
    device = slot_ids_TK.device
    order_N, token_N = (torch.empty(count, dtype=torch.int32, device=device) for _ in range(2))
    position_TK = torch.empty(slot_ids_TK.shape, dtype=torch.int32, device=device)
    ends_P = torch.empty(num_slots, dtype=torch.int32, device=device)
    place_rows_kernel[(num_slots + 1,)](
        slot_ids_TK.contiguous(),
        order_N,
        token_N,
        position_TK,
        ends_P,
        count,
        num_slots,
        K=top_k,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return order_N, token_N, position_TK, ends_P


_POINTERS = {"slot_ids_ptr": "*i64"} | dict.fromkeys(("order_ptr", "token_ptr", "position_ptr", "ends_ptr"), "*i32")

AUDIT = [
    KernelSpec(
        name="place_rows",
        kernel=place_rows_kernel,
        config=f"K=8, {BLOCK} choices a step",
        signature=_POINTERS | {"N": "i32", "P": "i32", "K": "constexpr", "BLOCK": "constexpr"},
        constexprs={"K": 8, "BLOCK": BLOCK},
    )
]
