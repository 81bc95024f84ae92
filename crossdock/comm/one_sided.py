# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator, no-untyped-call"
"""`push_rows`: rows stored straight into the other ranks' memory, then a signal, as one launch that never waits.

A program (g, p) stores its share of the rows for one rank. Ranks are visited in rotation, beginning behind this one, so
that no rank is everybody's first target. Once per rank a message goes along: two words that tell exchanges apart, how
many rows the sender has for the rank it has most for, one more word, and what the caller adds. Where some rank's rows
do not fit, none are stored, and all ranks learn it from the message.

Why the receiver may read: each program adds one to the receiver's counter of this rank once its own stores are done.
A barrier orders the stores of a program's threads before the one thread that adds, the addition releases them at system
scope, and all additions to a counter form one chain, so a receiver that acquires the last of them has every program's
stores. The count is the number of programs, because a release covers what its own program stored and nothing else.

On a CPU the same source is interpreted, between processes; see `runnable`. Rejected: one signal by a kernel launched
behind this one (a launch more), and one program per row (the interpreter takes 20 us an operation).

Legend: W ranks, N rows in memory, X units of a row (the widest integers that rows and addresses are multiples of),
M words a caller adds to a message, S rows sent.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import HAS_TRITON, tl, triton
from crossdock.comm.symmetric_heap import SymmetricHeap
from crossdock.errors import ConfigError

TAG = 1 << 62  # in the two words of messages: they differ from what no exchange has written
HEADER = 4  # words of a message before the caller's: word 0, word 1, most rows for one rank, the fourth word
PROGRAMS = {"cpu": 1, "cuda": 16}  # for each rank sent to, by the kind of device
ROWS, COLUMNS = 4, 512  # of a step, on a GPU
STEP = 1 << 15  # most units of a step in the interpreter, where each step costs the same, whatever its size
UNITS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True)
class Box:
    """Room in each rank's memory for what each rank sends it, from byte `at` on:

        signals int64 [W] | messages int64 [W, HEADER + words] | rows: W regions of region_bytes

    `shared`: one region, in which senders are told where to begin.
    """

    at: int
    world_size: int
    words: int
    region_bytes: int
    shared: bool = False

    @property
    def message_words(self) -> int:
        return HEADER + self.words

    @property
    def messages_at(self) -> int:
        return self.at + 8 * self.world_size

    @property
    def rows_at(self) -> int:
        end = self.messages_at + 8 * self.world_size * self.message_words
        return -(-end // 128) * 128

    @property
    def region_step(self) -> int:
        """Bytes from one rank's region to the next; a region begins at a multiple of 128."""
        return 0 if self.shared else -(-self.region_bytes // 128) * 128

    @property
    def end(self) -> int:
        regions = 1 if self.shared else self.world_size
        return self.rows_at + regions * (-(-self.region_bytes // 128) * 128)


@dataclass(frozen=True)
class Parcel:
    """What one rank sends: for rank p the places first[p] to last[p], where place i is row index[i], or row i itself.

    rows_NX       any dtype, contiguous
    first_W       integers, may be a strided view, as may last_W
    index         integers; None: places are rows
    to_W          the row of p's region in which the first one is put; None: 0
    message_WM    integers the caller adds to each rank's message; None: none
    words         word 0, word 1 and the fourth word of every message
    most_allowed  rows for one rank above which none are sent at all
    """

    rows_NX: Tensor
    first_W: Tensor
    last_W: Tensor
    words: tuple[int, int, int]
    most_allowed: int
    index: Tensor | None = None
    to_W: Tensor | None = None
    message_WM: Tensor | None = None


def push_rows_ref(parcel: Parcel, box: Box, heap: SymmetricHeap, programs: int) -> None:
    """The specification; nothing else may happen at the same time."""
    world, rank, rows_NX = len(heap.peers), heap.rank, parcel.rows_NX
    bytes_NB = rows_NX.view(torch.uint8)
    first, last = parcel.first_W.tolist(), parcel.last_W.tolist()
    most = max(end - start for start, end in zip(first, last, strict=True))
    for peer in ((rank + 1 + turn) % world for turn in range(world)):
        places = torch.arange(first[peer], last[peer] if most <= parcel.most_allowed else first[peer])
        sent_SB = bytes_NB[places if parcel.index is None else parcel.index[places].long()]
        begin = 0 if parcel.to_W is None else int(parcel.to_W[peer])
        at = box.rows_at + rank * box.region_step + begin * bytes_NB.shape[1]
        heap.peers[peer][at : at + sent_SB.numel()] = sent_SB.flatten()
        added = [] if parcel.message_WM is None else parcel.message_WM[peer].tolist()
        message = torch.tensor([*parcel.words[:2], most, parcel.words[2], *added])
        at = box.messages_at + rank * 8 * box.message_words
        heap.view(peer, at, (len(message),), torch.int64).copy_(message)
        heap.view(peer, box.at + 8 * rank, (1,), torch.int64).add_(programs)


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit(do_not_specialize=["word0", "word1", "word3"])
def push_rows_kernel(
    rows_ptr,  # [N, X] units
    index_ptr,  # [*] integers, or None
    first_ptr,  # [W] integers, strided
    last_ptr,  # [W] integers, strided
    to_ptr,  # [W] integers, or None
    message_ptr,  # [W, M] integers, strided, or None
    bases_ptr,  # [W] int64
    signal_at,  # bytes: where this rank's signal stands in every rank's memory; so its message and its rows
    message_at,
    rows_at,
    rank,
    world,
    X,
    most_allowed,
    word0,  # all three int64
    word1,
    word3,
    FIRST_STRIDE: tl.constexpr,
    LAST_STRIDE: tl.constexpr,
    MESSAGE_STRIDE: tl.constexpr,
    M: tl.constexpr,
    M_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # int64 all over: the interpreter checks other sums for overflow, slowly
    peer = (tl.program_id(1).to(tl.int64) + rank + 1) % world
    base = tl.load(bases_ptr + peer)
    each = tl.arange(0, W_BLOCK).to(tl.int64)
    ends = tl.load(last_ptr + each * LAST_STRIDE, mask=each < world, other=0)
    most = tl.reduce(ends - tl.load(first_ptr + each * FIRST_STRIDE, mask=each < world, other=0), 0, _larger)
    first = tl.load(first_ptr + peer * FIRST_STRIDE).to(tl.int64)
    count = tl.load(last_ptr + peer * LAST_STRIDE).to(tl.int64) - first
    count = tl.where(most <= most_allowed, count, 0)
    if program == 0:
        out_ptr = (base + message_at).to(tl.pointer_type(tl.int64))
        tl.store(out_ptr, word0)
        tl.store(out_ptr + 1, word1)
        tl.store(out_ptr + 2, most.to(tl.int64))
        tl.store(out_ptr + 3, word3)
        if message_ptr is not None:
            word = tl.arange(0, M_BLOCK).to(tl.int64)
            added = tl.load(message_ptr + peer * MESSAGE_STRIDE + word, mask=word < M, other=0)
            tl.store(out_ptr + 4 + word, added.to(tl.int64), mask=word < M)
    out_ptr = tl.multiple_of((base + rows_at).to(rows_ptr.dtype), 16)
    if to_ptr is not None:
        out_ptr += tl.load(to_ptr + peer).to(tl.int64) * X
    for start in range(program * ROWS, count, PROGRAMS * ROWS):
        place = tl.arange(0, ROWS).to(tl.int64) + start
        here = place < count
        row = first + place
        if index_ptr is not None:
            row = tl.load(index_ptr + row, mask=here, other=0).to(tl.int64)
        for column in range(0, X, COLUMNS):
            col = (tl.arange(0, COLUMNS).to(tl.int64) + column)[None, :]
            mask = here[:, None] & (col < X)
            value = tl.load(rows_ptr + row[:, None] * X + col, mask=mask)
            tl.store(out_ptr + place[:, None] * X + col, value, mask=mask)
    tl.debug_barrier()  # all threads' stores before the one thread that signals
    tl.atomic_add((base + signal_at).to(tl.pointer_type(tl.int64)), 1, sem="release", scope="sys")


def push_rows_triton(parcel: Parcel, box: Box, heap: SymmetricHeap, programs: int) -> None:
    """`push_rows_ref` in one launch; on a GPU it has only started when this returns."""
    rows_NX, message_WM, world = as_units(parcel.rows_NX), parcel.message_WM, len(heap.peers)
    size_X = rows_NX.shape[1]
    rows, columns = ROWS, COLUMNS
    if heap.device.type == "cpu":
        columns = min(power_of_two(size_X), STEP)
        rows = min(power_of_two(len(rows_NX if parcel.index is None else parcel.index)), max(1, STEP // columns))
    words = 0 if message_WM is None else message_WM.shape[1]
    runnable(push_rows_kernel, heap.device)[(programs, world)](
        rows_NX,
        parcel.index,
        parcel.first_W,
        parcel.last_W,
        parcel.to_W,
        message_WM,
        heap.bases_W,
        box.at + 8 * heap.rank,
        box.messages_at + heap.rank * 8 * box.message_words,
        box.rows_at + heap.rank * box.region_step,
        heap.rank,
        world,
        size_X,
        parcel.most_allowed,
        *parcel.words,
        FIRST_STRIDE=parcel.first_W.stride(0),
        LAST_STRIDE=parcel.last_W.stride(0),
        MESSAGE_STRIDE=0 if message_WM is None else message_WM.stride(0),
        M=words,
        M_BLOCK=power_of_two(words),
        W_BLOCK=power_of_two(world),
        PROGRAMS=programs,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )


def as_units(rows_NX: Tensor) -> Tensor:
    """Rows as the widest integers that their bytes and their address allow."""
    bytes_NB = rows_NX.view(torch.uint8)
    width = bytes_NB.shape[1]
    return next(
        bytes_NB.view(unit)
        for unit in UNITS
        if unit.itemsize == 1 or (width and width % unit.itemsize == bytes_NB.data_ptr() % unit.itemsize == 0)
    )


def power_of_two(number: int) -> int:
    """The least one that is no smaller than `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def runnable(kernel: Any, device: torch.device) -> Any:
    """`kernel` in the form that runs on `device`: on a CPU the interpreter's, whatever TRITON_INTERPRET says.

    Such kernels call nothing that Triton itself defines as a kernel, as `tl.sum` is: without TRITON_INTERPRET that is
    not interpreted. Raises ConfigError without Triton.
    """
    if not HAS_TRITON:
        raise ConfigError("transport 'symmetric' is made of Triton kernels, but the triton package is not installed")
    return kernel if device.type != "cpu" else _interpreted(kernel)


@functools.cache
def _interpreted(kernel: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return kernel if isinstance(kernel, InterpretedFunction) else InterpretedFunction(kernel.fn)


_TYPES = {"rows_ptr": "*i64", "index_ptr": "*i32", "first_ptr": "*i32", "last_ptr": "*i32", "to_ptr": "*i32",
          "message_ptr": "*i32", "bases_ptr": "*i64", "signal_at": "i32", "message_at": "i32", "rows_at": "i64",
          "rank": "i32", "world": "i32", "X": "i32", "most_allowed": "i32", "word0": "i64", "word1": "i64",
          "word3": "i64"}  # fmt: skip


def _audit(config: str, absent: tuple[str, ...], types: dict[str, str], **strides: int) -> KernelSpec:
    constexprs: dict[str, Any] = {"FIRST_STRIDE": 1, "LAST_STRIDE": 1, "MESSAGE_STRIDE": 0, "M": 0, "M_BLOCK": 1}
    constexprs |= {"W_BLOCK": 8, "PROGRAMS": PROGRAMS["cuda"], "ROWS": ROWS, "COLUMNS": COLUMNS} | strides
    constexprs |= dict.fromkeys(absent)
    signature = _TYPES | types | dict.fromkeys(constexprs, "constexpr")
    return KernelSpec("push_rows", push_rows_kernel, config, signature, constexprs, num_warps=8,
                      multiples=("X", "rows_at"))  # fmt: skip


_STRIDED = {"FIRST_STRIDE": 32, "LAST_STRIDE": 32, "MESSAGE_STRIDE": 32, "M": 33, "M_BLOCK": 64}
_HOST = dict.fromkeys(("first_ptr", "last_ptr", "message_ptr"), "*i64")

AUDIT = [
    _audit("gathered by token, with counts", ("to_ptr",), {}, **_STRIDED),
    _audit("returned to their places", ("message_ptr",), {}),
    _audit("as they lie", ("index_ptr", "to_ptr"), _HOST, MESSAGE_STRIDE=13, M=13, M_BLOCK=16),
]
