# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""Which rows a program works on when groups are ragged and only the device knows where they end.

The host may not read `ends` (it would wait for the device), so it launches an upper bound of tiles, and each program
finds its own by a scan over the groups' tile counts; those past the last leave at once. With BLOCK_M = 4:

    ends      3     3         9
    rows      a a a | | b b b b b b        (group 1 is empty)
    tiles     0 0 0 .   1 1 1 1            tile 2 holds the last 2 rows of b; programs 3 and 4 leave
                            2 2 . .

The masked layout gives every group a slab of `slab` rows, of which the first `count` are used. The same scan serves it,
with other starts. Slabs of 4:

    counts    3     0     2
    rows      a a a . . . . . c c . .      group 0 stands in rows 0-2, group 2 in rows 8-9

A tile never holds rows of two groups. What was rejected: padding groups to whole tiles (needs a copy of the rows, up to
20% more of them), and a second kernel that writes the map (one more launch and a round trip for some 256 integers).

Legend: L groups, M rows of a tile, R rows.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from crossdock._triton import tl, triton

GROUP_M = 8  # row tiles that share a weight tile while it is in the L2 cache


def tile_bound(rows: int, groups: int, block_m: int, slab: int = 0) -> int:
    """At least as many row tiles as any split of `rows` over `groups` has: each group wastes less than one."""
    return groups * -(-slab // block_m) if slab else -(-rows // block_m) + groups


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def map_options(groups: int, row_ids_R: Tensor | None, slab: int = 0) -> dict[str, bool | int]:
    """The compile-time arguments of a kernel that finds its rows with `find_tile` and `source_rows`."""
    return {
        "GATHER": row_ids_R is not None,
        "MASKED": slab > 0,
        "L_POW2": next_power_of_2(groups),
        "GROUP_M": GROUP_M,
    }


def all_rows(device: torch.device) -> Tensor:
    """A count no slab reaches, int32 [1]: all rows of the one group there is, for any number of them.

    Not kept where a graph is captured, as the graph owns its tensors.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _largest(device)
    return _kept_largest(device)


def _largest(device: torch.device) -> Tensor:
    return torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)


_kept_largest = lru_cache(_largest)


def spans(ends_L: Tensor, slab: int = 0) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end row) of every group that has rows: what the tile map means, read on the host."""
    start = 0
    for group, end in enumerate(ends_L.tolist()):
        if slab:
            start, end = group * slab, group * slab + end
        if end > start:
            yield group, start, end
        start = end


def rows_of(tensor: Tensor, start: int, end: int, row_ids_R: Tensor | None) -> Tensor:
    """Rows `start` to `end` of the group order, which `row_ids_R` maps to rows of `tensor` where it is given."""
    return tensor[start:end] if row_ids_R is None else tensor[row_ids_R[start:end]]


def gather_rows(rows_TK: Tensor, row_ids_R: Tensor, ends_L: Tensor) -> Tensor:
    """rows[row_ids] in group order -> [R, K], with no synchronisation; differentiable.

    Ids behind the last end may be anything: they are not used, and what a gradient holds there goes nowhere. By
    indexing and not index_select, whose backward on a GPU adds in whatever order its atomics come.
    """
    if rows_TK.shape[0] == 0:  # then no id is in use; one row of zeros to point at
        rows_TK = torch.nn.functional.pad(rows_TK, (0, 0, 0, 1))
    live_R = torch.arange(row_ids_R.shape[0], device=row_ids_R.device) < ends_L[-1:].sum()
    gathered_RK = rows_TK[torch.where(live_R, row_ids_R, 0)]
    return torch.where(live_R[:, None], gathered_RK, 0.0) if gathered_RK.requires_grad else gathered_RK


@triton.jit
def find_tile(ends_ptr, tile, L, BLOCK_M: tl.constexpr, L_POW2: tl.constexpr, slab=0, MASKED: tl.constexpr = False):
    """-> (group, first row, end row of the group) of row tile `tile`; first >= end where there is no such tile.

    MASKED: `ends_ptr` holds counts, and the groups start `slab` rows apart.
    """
    group_L = tl.arange(0, L_POW2)
    end_L = tl.load(ends_ptr + group_L, mask=group_L < L, other=0)
    if MASKED:
        start_L = group_L * slab
        end_L = start_L + tl.minimum(end_L, slab)
    else:
        start_L = tl.load(ends_ptr + group_L - 1, mask=(group_L > 0) & (group_L < L), other=0)
    tiles_L = tl.where(group_L < L, (end_L - start_L + BLOCK_M - 1) // BLOCK_M, 0)
    through_L = tl.cumsum(tiles_L, 0)
    group = tl.sum((through_L <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(through_L <= tile, through_L, 0), 0)
    start = tl.sum(tl.where(group_L == group, start_L, 0), 0)
    end = tl.sum(tl.where(group_L == group, end_L, 0), 0)
    return group, start + (tile - before) * BLOCK_M, end


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Program id -> (row tile, column tile): GROUP_M row tiles run down each column tile before the next column."""
    per_band = GROUP_M * tiles_n
    first_m = pid // per_band * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + pid % per_band % height, pid % per_band // height


@triton.jit
def source_rows(row_ids_ptr, row_M, end, GATHER: tl.constexpr):
    """Where the rows of a tile stand in memory, int64 [M].

    Rows past the end read the last one again, which costs no mask in the main loop; they are never stored.
    """
    from_M = tl.minimum(row_M, end - 1)
    if GATHER:
        from_M = tl.load(row_ids_ptr + from_M)
    return from_M.to(tl.int64)
