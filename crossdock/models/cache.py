"""The paged cache: what attention keeps of every past token, in pages handed out to sequences as they grow.

Legend: T tokens of this step, S sequences of this step, C cached values a token and layer (MLA: latent + rotary key;
GQA: keys and values of all key-value heads).

A sequence owns pages; a token's cache row is page * page_size + offset, the same in every layer:

    sequence A  pages [0, 2]      rows 0 1 2 3 | 8 9          (page_size 4, 6 tokens)
    sequence B  pages [1]         rows 4 5 6
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossdock.errors import CapacityOverflow


@dataclass(frozen=True)
class Span:
    """One sequence's tokens of a step: flat tokens `start:stop`, of which the last has `context` tokens up to itself.

    `rows` are the cache rows of its pages, of which the first `context` hold tokens: a slice where they lie together,
    else int64.
    `decode` says that its tokens continue a cached sequence one by one (absorbed attention), not a prompt.
    """

    start: int
    stop: int
    context: int
    rows: slice | Tensor
    decode: bool


@dataclass(frozen=True)
class Batch:
    """The flat tokens of one step. positions_T int64; rows_T int64, the cache row each token is written to."""

    positions_T: Tensor
    rows_T: Tensor
    spans: tuple[Span, ...]


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
            spans.append(Span(start, len(positions), context, self._rows(sequence), decode))
        positions_T, rows_T = torch.tensor([positions, rows], dtype=torch.int64, device=self.data.device)
        return Batch(positions_T, rows_T, tuple(spans))

    def _rows(self, sequence: Sequence) -> slice | Tensor:
        pages, first = sequence.pages, sequence.pages[0]
        if pages == list(range(first, first + len(pages))):
            return slice(first * self.page_size, (first + len(pages)) * self.page_size)
        rows = torch.tensor(pages)[:, None] * self.page_size + torch.arange(self.page_size)
        return rows.flatten().to(self.data.device)


def whole_sequences(count: int, length: int, device: torch.device) -> Batch:
    """A step without a cache: `count` sequences of `length` tokens each from position 0, as in training."""
    positions_T = torch.arange(length, device=device).repeat(count)
    spans = tuple(Span(i * length, (i + 1) * length, length, slice(0, 0), False) for i in range(count))
    return Batch(positions_T, positions_T, spans)
