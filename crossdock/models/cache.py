"""The paged cache: what attention keeps of every past token, in pages handed out to sequences as they grow.

Legend: T tokens of this step, S sequences of this step, C cached values a token and layer (MLA: latent + rotary key;
GQA: keys and values of all key-value heads), N decoded tokens of this step, W portions of their contexts, P pages of
the sequence that has most.

A sequence owns pages; a token's cache row is page * page_size + offset, the same in every layer:

    sequence A  pages [0, 2]      rows 0 1 2 3 | 8 9          (page_size 4, 6 tokens)
    sequence B  pages [1]         rows 4 5 6

Where one launch serves all decoded tokens, it reads the same from tables on the device (`Decoding`), which a step
builds once, when they are first asked for. They also cut every context into portions, since one token's context, read
by one program, leaves a GPU idle. How long a token's portions are depends on its own context only, and so do its bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from crossdock.errors import CapacityOverflow
from crossdock.moe.two_batch import Steps, interleave, run

PORTION = 512  # context tokens of a portion, or the multiple of it that gives a token at most MAX_PORTIONS
MAX_PORTIONS = 32
ALIGN = 4  # int32 values of 16 bytes: Triton compiles a kernel anew for a table that starts elsewhere


@dataclass(frozen=True)
class Span:
    """One sequence's tokens of a step: flat tokens `start:stop`, of which the last has `context` tokens up to itself.

    `pages` of `page_size` tokens each are its own. `decode` says that its tokens continue a cached sequence one by one
    (absorbed attention), not a prompt.
    """

    start: int
    stop: int
    context: int
    decode: bool
    pages: tuple[int, ...]
    page_size: int
    device: torch.device

    @cached_property
    def rows(self) -> slice | Tensor:
        """The cache rows of its pages, of which the first `context` hold tokens: a slice where they lie together, else
        int64."""
        first, count = self.pages[0] if self.pages else 0, len(self.pages)
        if self.pages == tuple(range(first, first + count)):
            return slice(first * self.page_size, (first + count) * self.page_size)
        rows = torch.tensor(self.pages)[:, None] * self.page_size + torch.arange(self.page_size)
        return rows.flatten().to(self.device)


@dataclass(frozen=True)
class Decoding:
    """The decoded tokens of a step and the portions their contexts are read in; all int32, on the cache's device.

    Token n of these is flat token `tokens_N[n]`, and its portions are first_N1[n] up to first_N1[n + 1], in the order
    of the context. Portion w is that of token `owner_W[w]` (of these): context tokens start_W[w] up to stop_W[w] in the
    pages of row sequence_W[w] of `pages_SP`. Rows of `pages_SP` are filled up with zeros.
    """

    page_size: int
    tokens_N: Tensor
    first_N1: Tensor
    owner_W: Tensor
    sequence_W: Tensor
    start_W: Tensor
    stop_W: Tensor
    pages_SP: Tensor


@dataclass(frozen=True)
class Batch:
    """The flat tokens of one step. positions_T int64; rows_T int64, the cache row each token is written to."""

    positions_T: Tensor
    rows_T: Tensor
    spans: tuple[Span, ...]

    def halves(self) -> "tuple[Batch, Batch]":
        """The first sequences and the others, where about half the tokens end; either may have none."""
        tokens = len(self.positions_T)
        count = min(range(len(self.spans) + 1), key=lambda n: abs(2 * self._stop(n) - tokens))
        cut = self._stop(count)
        others = tuple(replace(span, start=span.start - cut, stop=span.stop - cut) for span in self.spans[count:])
        first = Batch(self.positions_T[:cut], self.rows_T[:cut], self.spans[:count])
        return first, Batch(self.positions_T[cut:], self.rows_T[cut:], others)

    def _stop(self, count: int) -> int:
        return self.spans[count - 1].stop if count else 0

    @cached_property
    def decoding(self) -> Decoding | None:
        """Tables of the spans that decode; None where there are none."""
        spans = [span for span in self.spans if span.decode]
        return _tables(spans, self.positions_T.device) if spans else None


def _tables(spans: list[Span], device: torch.device) -> Decoding:
    """Lists on the host, and one copy to the device for all of them."""
    tokens: list[int] = []
    first = [0]
    portions: list[tuple[int, int, int, int]] = []
    for sequence, span in enumerate(spans):
        for token in range(span.start, span.stop):
            context = span.context - (span.stop - 1 - token)
            size = PORTION * -(-context // (PORTION * MAX_PORTIONS))
            portions += [(len(tokens), sequence, at, min(at + size, context)) for at in range(0, context, size)]
            tokens.append(token)
            first.append(len(portions))
    widest = max(len(span.pages) for span in spans)
    pages = [page for span in spans for page in (*span.pages, *(0,) * (widest - len(span.pages)))]
    columns = [tokens, first, *map(list, zip(*portions, strict=True)), pages]
    values = [value for column in columns for value in (*column, *(0,) * (-len(column) % ALIGN))]
    on_gpu = device.type == "cuda"
    flat = torch.tensor(values, dtype=torch.int32, pin_memory=on_gpu).to(device, non_blocking=True)
    whole = torch.split(flat, [len(column) + -len(column) % ALIGN for column in columns])
    parts = [part[: len(column)] for part, column in zip(whole, columns, strict=True)]
    parts[-1] = parts[-1].view(len(spans), widest)
    return Decoding(spans[0].page_size, *parts)


def in_batches(
    stages: Callable[[Tensor, Batch, "PagedCache | None"], Steps[Tensor]],
    ids_T: Tensor,
    batch: Batch,
    cache: "PagedCache | None",
    two: bool,
) -> Tensor:
    """What the stages return for the batch, worked on whole or as two halves that overlap (`crossdock.moe.two_batch`).

    Every rank takes part with as many: a half may have no tokens.
    """
    if not two:
        return run(stages(ids_T, batch, cache))
    halves = batch.halves()
    ids = torch.split(ids_T, [len(half.positions_T) for half in halves])
    return torch.cat(interleave([stages(part, half, cache) for part, half in zip(ids, halves, strict=True)]))


@dataclass
class Sequence:
    """Pages and length (tokens whose cache rows are valid) of one sequence."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagedCache:
    """`data` is [layers, pages * page_size, C] in `dtype`. Raises CapacityOverflow when no page is left."""

    def __init__(
        self, layers: int, width: int, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.data = torch.zeros(layers, num_pages * page_size, width, dtype=dtype, device=device)
        self.derived: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, of weights: valid as long as the rows kept are
        self.page_size = page_size
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    def write(self, layer: int, rows_T: Tensor, values_TC: Tensor) -> None:
        """Stores one row a token."""
        self.data[layer].index_copy_(0, rows_T, values_TC)

    def read(self, layer: int, rows: slice | Tensor) -> Tensor:
        """The rows asked for, [rows, C]; a view where they lie together."""
        return self.data[layer][rows]

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Gives `sequence` pages for `length` tokens."""
        wanted = -(-length // self.page_size) - len(sequence.pages)
        if wanted > len(self._free):
            raise CapacityOverflow(
                f"paged cache: a sequence of {length} tokens needs {wanted} more pages of {self.page_size} tokens, "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        for _ in range(wanted):
            page = self._free.pop()
            self.data[:, page * self.page_size : (page + 1) * self.page_size] = 0  # masked rows are multiplied by zero
            sequence.pages.append(page)

    def release(self, sequence: Sequence) -> None:
        """Takes the pages of a finished sequence back."""
        self._free.extend(reversed(sequence.pages))
        sequence.pages.clear()
        sequence.length = 0

    def batch(self, pieces: list[tuple[Sequence, int, bool]]) -> Batch:
        """Lays out a step in which each sequence adds `count` tokens after its `length`; (sequence, count, decode)."""
        positions: list[int] = []
        rows: list[int] = []
        spans: list[Span] = []
        for sequence, count, decode in pieces:
            context = sequence.length + count
            self.reserve(sequence, context)
            start = len(positions)
            new = range(sequence.length, context)
            positions.extend(new)
            rows.extend(sequence.pages[p // self.page_size] * self.page_size + p % self.page_size for p in new)
            pages, size = tuple(sequence.pages), self.page_size
            spans.append(Span(start, len(positions), context, decode, pages, size, self.data.device))
        positions_T, rows_T = torch.tensor([positions, rows], dtype=torch.int64, device=self.data.device)
        return Batch(positions_T, rows_T, tuple(spans))


def whole_sequences(count: int, length: int, device: torch.device) -> Batch:
    """A step without a cache: `count` sequences of `length` tokens each from position 0, as in training."""
    positions_T = torch.arange(length, device=device).repeat(count)
    spans = tuple(Span(i * length, (i + 1) * length, length, False, (), 1, device) for i in range(count))
    return Batch(positions_T, positions_T, spans)
