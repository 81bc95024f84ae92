# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator, no-untyped-call"
"""`wait_signals`: waits, a bounded number of polls, for what `push_rows` of every rank announces; then reads messages.

One program a source rank, and a launch of its own: only this one ever spins, so that sending and waiting are apart, and
several ranks on one GPU do not block one another. It never traps. What it found goes into a status word of its source:

    0 arrived   1 MISSING, (signals seen)   2 DIFFERENT, (word 0, word 1) found   3 TOO_MANY, (most rows, fourth word)

and behind that the two words that were awaited, since whoever reads it may be awaiting others by then.

A counter is never reset: `consumed` on the device says how much of it earlier exchanges account for, so that a captured
graph can be replayed. Where a rank is missing, later waits look once instead of spinning, until the host has cleared
the last status row, which says that any rank had anything but 0.

Legend: W ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.comm.one_sided import PROGRAMS, Box, runnable
from crossdock.comm.symmetric_heap import SymmetricHeap

MISSING, DIFFERENT, TOO_MANY = 1, 2, 3
STATUS = 5  # words of a source's status: what, two that say more, and the two awaited


@dataclass(frozen=True)
class Awaited:
    """What is waited for: messages with these two words, and no more rows or fourth word than these."""

    words: tuple[int, int]
    most_allowed: int
    word3_allowed: int


def wait_signals_ref(
    awaited: Awaited, box: Box, heap: SymmetricHeap, programs: int, consumed_W: Tensor, status: Tensor, retry: int
) -> None:
    """The specification, for a moment in which nothing moves, however many polls are allowed."""
    for source in range(len(consumed_W)):
        if int(status[source, 0]) != retry:
            continue
        seen = int(heap.view(heap.rank, box.at + 8 * source, (1,), torch.int64)) - int(consumed_W[source])
        found = [MISSING, seen, 0, *awaited.words]
        if seen >= programs:
            consumed_W[source] += programs
            at = box.messages_at + source * 8 * box.message_words
            *words, most, word3 = heap.view(heap.rank, at, (4,), torch.int64).tolist()
            found[:3] = 0, 0, 0
            if most > awaited.most_allowed or word3 > awaited.word3_allowed:
                found[:3] = TOO_MANY, most, word3
            if words != list(awaited.words):
                found[:3] = DIFFERENT, *words
        if found[0] or retry:
            status[source] = torch.tensor(found)
        if found[0]:
            status[-1, 0] = 1


@triton.jit(do_not_specialize=["polls", "word0", "word1"])
def wait_signals_kernel(
    bases_ptr,  # [W] int64
    consumed_ptr,  # [W] int64
    status_ptr,  # [W + 1, 5] int64
    signals_at,  # bytes: where signals stand in this rank's memory; so messages
    messages_at,
    message_words,
    rank,
    world,
    arrivals,
    polls,
    retry,  # 1: look only at sources that were missing, and clear what is no longer so; 0: at those with status 0
    most_allowed,
    word3_allowed,
    word0,
    word1,
):
    source = tl.program_id(0).to(tl.int64)
    found_ptr = status_ptr + source * 5
    if tl.load(found_ptr) == retry:
        base = tl.load(bases_ptr + rank)
        failed = tl.load(status_ptr + world * 5)
        most_polls = tl.where((failed != 0) & (retry == 0), 1, polls)
        before = tl.load(consumed_ptr + source)
        signal_ptr = (base + signals_at + source * 8).to(tl.pointer_type(tl.int64))
        seen = tl.atomic_add(signal_ptr, 0, sem="acquire", scope="sys") - before
        polled = tl.full((), 1, tl.int64)
        while (seen < arrivals) & (polled < most_polls):
            seen = tl.atomic_add(signal_ptr, 0, sem="acquire", scope="sys") - before
            polled += 1
        what = tl.full((), 1, tl.int64)
        more = seen
        last = tl.full((), 0, tl.int64)
        if seen >= arrivals:
            tl.store(consumed_ptr + source, before + arrivals)
            message_ptr = (base + messages_at + source * 8 * message_words).to(tl.pointer_type(tl.int64))
            first = tl.load(message_ptr, volatile=True)
            second = tl.load(message_ptr + 1, volatile=True)
            most = tl.load(message_ptr + 2, volatile=True)
            fourth = tl.load(message_ptr + 3, volatile=True)
            different = (first != word0) | (second != word1)
            many = (most > most_allowed) | (fourth > word3_allowed)
            what = tl.where(different, 2, tl.where(many, 3, 0)).to(tl.int64)
            more = tl.where(different, first, tl.where(many, most, 0))
            last = tl.where(different, second, tl.where(many, fourth, 0))
        if (what != 0) | (retry != 0):
            tl.store(found_ptr, what)
            tl.store(found_ptr + 1, more)
            tl.store(found_ptr + 2, last)
            tl.store(found_ptr + 3, word0)
            tl.store(found_ptr + 4, word1)
        if what != 0:
            tl.store(status_ptr + world * 5, 1)


def wait_signals_triton(
    awaited: Awaited,
    box: Box,
    heap: SymmetricHeap,
    programs: int,
    consumed_W: Tensor,
    status: Tensor,
    retry: int,
    polls: int = 1,
) -> None:
    """`wait_signals_ref` after at most `polls` looks at each counter; on a GPU it has only started on return."""
    world = len(consumed_W)
    runnable(wait_signals_kernel, heap.device)[(world,)](
        heap.bases_W,
        consumed_W,
        status,
        box.at,
        box.messages_at,
        box.message_words,
        heap.rank,
        world,
        programs,
        polls,
        retry,
        awaited.most_allowed,
        awaited.word3_allowed,
        *awaited.words,
        num_warps=1,
    )


_SIGNATURE = dict.fromkeys(("bases_ptr", "consumed_ptr", "status_ptr"), "*i64") | dict.fromkeys(
    ("signals_at", "messages_at", "message_words", "rank", "world", "arrivals"), "i32"
)
_SIGNATURE |= {"polls": "i64", "retry": "i32", "most_allowed": "i32", "word3_allowed": "i32"}
_SIGNATURE |= {"word0": "i64", "word1": "i64"}

AUDIT = [
    KernelSpec(
        name="wait_signals",
        kernel=wait_signals_kernel,
        config=f"{PROGRAMS['cuda']} programs a source",
        signature=_SIGNATURE,
        num_warps=1,
    )
]
