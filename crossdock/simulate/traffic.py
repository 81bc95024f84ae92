"""`Traffic`: how many rows each rank sends to each other, counted from the experts that tokens chose.

Counted, not estimated: the busiest link decides how long an exchange takes, and no formula has it. All schedules are
counted in one pass over blocks of ranks, as the hierarchical rows follow from a few counts per token. What each row
weighs is for schedules.py to say.

Legend: W ranks, N nodes, M ranks a node, T tokens a rank, K experts per token, P slots, L slots a rank, B ranks in a
block. Rank w stands on node w // M at index w % M; ranks with one index on all nodes are a rail.

    flat    from w for each (token, k), to the rank that holds it                                   flat_WW
    once    from w for each (token, rank with one of its experts)                                   once_WW
    outer   from w for each (token, node with one of its experts), to the rank of its rail there    outer_WN
    inner   from that rank what flat or once say of its rail's tokens and its node
    ring    from node to node up to the farthest with one of the token's experts                    far_WN
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from crossdock.simulate.slots import Slots

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """Counts of rows for one part of all ranks' tokens; two parts add up.

    tokens_W     tokens of each rank
    flat_WW      (token, k) rows from rank to rank, its own included
    once_WW      (token, rank) rows from rank to rank, its own included
    outer_WN     (token, node) pairs of each rank, its own node included
    far_WN       tokens of each rank by how many nodes on their farthest expert is: 0 for none beyond their own
    rows_P       rows each slot computes
    top_k        K, for what travels with each row
    """

    ranks_per_node: int
    top_k: int
    tokens_W: Counts
    flat_WW: Counts
    once_WW: Counts
    outer_WN: Counts
    far_WN: Counts
    rows_P: Counts

    def __add__(self, other: "Traffic") -> "Traffic":
        pairs = ((getattr(self, name), getattr(other, name)) for name in _COUNTS)
        return Traffic(self.ranks_per_node, self.top_k, *(a + b for a, b in pairs))

    @property
    def ranks(self) -> int:
        return len(self.tokens_W)

    @property
    def nodes(self) -> int:
        return int(self.outer_WN.shape[1])

    @property
    def node_of_W(self) -> Counts:
        return np.arange(self.ranks) // self.ranks_per_node

    @cached_property
    def rows_W(self) -> Counts:
        """Rows each rank computes."""
        rows_W: Counts = self.flat_WW.sum(0)
        return rows_W

    @cached_property
    def rail_WW(self) -> Counts:
        """outer_WN without each rank's own node, as rows from rank to rank: each goes to the rank of its own index."""
        size, index_W = self.ranks_per_node, np.arange(self.ranks) % self.ranks_per_node
        spread_WNM = np.zeros((self.ranks, self.nodes, size), dtype=np.int64)
        spread_WNM[np.arange(self.ranks), :, index_W] = self.outer_WN
        spread_WNM[np.arange(self.ranks), self.node_of_W, index_W] = 0
        return spread_WNM.reshape(self.ranks, self.ranks)

    def inside(self, rows_WW: Counts, is_far: bool) -> Counts:
        """What ranks send inside their nodes, of rows counted from rank to rank, as rows from rank to rank.

        Those of a node's own tokens, or those of its rails' other ranks, for which a rank stands in here.
        """
        nodes, size = self.nodes, self.ranks_per_node
        rows_NMNM = rows_WW.reshape(nodes, size, nodes, size)
        every_N = np.arange(nodes)
        passed_NMM = rows_NMNM[every_N, :, every_N]
        if is_far:
            passed_NMM = np.moveaxis(rows_NMNM.sum(0), 0, 1) - passed_NMM
        wide_NMNM = np.zeros((nodes, size, nodes, size), dtype=np.int64)
        wide_NMNM[every_N, :, every_N] = passed_NMM
        return wide_NMNM.reshape(self.ranks, self.ranks)

    @cached_property
    def ring_NM(self) -> Counts:
        """[n, i]: rows that pass from node n to node n + 1 between the ranks of index i."""
        passing_WN = self.far_WN[:, ::-1].cumsum(1)[:, ::-1][:, 1:]  # tokens that go on after 0, 1, ... nodes
        by_node = passing_WN.reshape(self.nodes, self.ranks_per_node, self.nodes - 1)
        links_NM = np.zeros((self.nodes, self.ranks_per_node), dtype=np.int64)
        for hop in range(self.nodes - 1):
            links_NM += np.roll(by_node[:, :, hop], hop, axis=0)
        return links_NM


_COUNTS = ("tokens_W", "flat_WW", "once_WW", "outer_WN", "far_WN", "rows_P")


def count_traffic(
    blocks: Iterable[NDArray[np.int32]], slots: Slots, ranks_per_node: int, bounds: Sequence[int]
) -> list[Traffic]:
    """One Traffic for the tokens bounds[0] to bounds[1] - 1 of every rank, one for the next, and so on.

    `blocks` are expert ids [B, T, K] of consecutive ranks, all ranks together; -1 is no expert.
    """
    ranks, nodes = slots.ranks, slots.ranks // ranks_per_node
    sizes = {"tokens_W": (), "flat_WW": (ranks,), "once_WW": (ranks,), "outer_WN": (nodes,), "far_WN": (nodes,)}
    found: list[dict[str, Counts]] = []
    for _ in bounds[1:]:
        counts = {name: np.zeros((ranks, *size), dtype=np.int64) for name, size in sizes.items()}
        found.append(counts | {"rows_P": np.zeros(len(slots.expert_of_P), dtype=np.int64)})
    first = top_k = 0
    for ids_BTK in blocks:
        slots_BTK, top_k = slots.choose(ids_BTK), ids_BTK.shape[2]
        for counts, (begin, end) in zip(found, pairwise(bounds), strict=True):
            _count(slots_BTK[:, begin:end], first, slots.per_rank, ranks_per_node, counts)
        first += len(ids_BTK)
    return [Traffic(ranks_per_node, top_k, **counts) for counts in found]


def chunk_bounds(tokens: int, chunks: int) -> list[int]:
    """Where each chunk of a layer's tokens begins, and the end: the first and the last are half as large as the others.

    >>> chunk_bounds(12, 4)
    [0, 2, 6, 10, 12]
    """
    halves = [0, *range(1, 2 * chunks - 2, 2), 2 * chunks - 2] if chunks > 1 else [0, 1]
    return [tokens * at // halves[-1] for at in halves]


def count_chunks(
    blocks: Iterable[NDArray[np.int32]], slots: Slots, ranks_per_node: int, tokens: int, chunks: Iterable[int]
) -> dict[int, list[Traffic]]:
    """The traffic of each chunk, for each number of chunks, in one pass: rows between neighbouring bounds add up."""
    wanted = {count: chunk_bounds(tokens, count) for count in chunks}
    bounds = sorted({bound for each in wanted.values() for bound in each})
    pieces = dict(zip(bounds, count_traffic(blocks, slots, ranks_per_node, bounds), strict=False))
    empty = count_traffic([], slots, ranks_per_node, [0, 0])[0]

    def between(begin: int, end: int) -> Traffic:
        inside = [pieces[bound] for bound in bounds if begin <= bound < end]
        return sum(inside[1:], inside[0]) if inside else empty

    return {count: [between(begin, end) for begin, end in pairwise(each)] for count, each in wanted.items()}


def _count(
    slots_BTK: NDArray[np.int32], first: int, per_rank: int, ranks_per_node: int, counts: dict[str, Counts]
) -> None:
    """Adds what a block of ranks, `first` and following, sends."""
    block, tokens, top_k = slots_BTK.shape
    ranks, nodes = counts["outer_WN"].shape
    own, last = slice(first, first + block), block * tokens
    there_NK = (slots_BTK >= 0).reshape(last, top_k)
    rank_NK = slots_BTK.reshape(last, top_k) // np.int32(per_rank)
    source_N = np.repeat(np.arange(block, dtype=np.int64), tokens)
    counts["tokens_W"][own] += tokens
    counts["rows_P"] += np.bincount(slots_BTK[slots_BTK >= 0], minlength=len(counts["rows_P"]))
    pair = (source_N[:, None] * ranks + rank_NK)[there_NK]
    counts["flat_WW"][own] += np.bincount(pair, minlength=block * ranks).reshape(block, ranks)

    rank_NK = np.sort(np.where(there_NK, rank_NK, -1).astype(np.int16), axis=1)
    distinct_NK = _first_of_each(rank_NK)
    pair = (source_N[:, None] * ranks + rank_NK)[distinct_NK]
    counts["once_WW"][own] += np.bincount(pair, minlength=block * ranks).reshape(block, ranks)
    node_NK = rank_NK // np.int16(ranks_per_node)  # -1 stays -1
    distinct_NK = _first_of_each(node_NK)
    pair = (source_N[:, None] * nodes + node_NK)[distinct_NK]
    counts["outer_WN"][own] += np.bincount(pair, minlength=block * nodes).reshape(block, nodes)

    home_N1 = ((first + source_N) // ranks_per_node)[:, None]
    far_N = np.where(node_NK >= 0, (node_NK - home_N1) % nodes, 0).max(1, initial=0)
    pair = source_N * nodes + far_N
    counts["far_WN"][own] += np.bincount(pair, minlength=block * nodes).reshape(block, nodes)


def _first_of_each(sorted_NK: NDArray[np.int16]) -> NDArray[np.bool_]:
    """True once for each value of a row but -1; rows are in ascending order."""
    first_NK = sorted_NK >= 0
    first_NK[:, 1:] &= sorted_NK[:, 1:] != sorted_NK[:, :-1]
    return first_NK
