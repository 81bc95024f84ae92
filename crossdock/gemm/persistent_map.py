# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The tile map of kernels whose programs stay: each takes tile after tile, and none is launched for nothing.

As many programs run as the device holds at once, and of P of them program p takes tiles p, p + P, p + 2P, ... of those
that exist. A program scans the groups once (`scan_groups`); what is left for each tile is a search in registers
(`tile_at`). With 2 programs and BLOCK_M = 4, one column of tiles:

    ends      3     3         9
    rows      a a a | | b b b b b b
    tiles     0 0 0     1 1 1 1 2 2        program 0 takes tiles 0 and 2, program 1 takes tile 1

Why stay: in FP8 a tile of K = 2048 is 16 steps, and a program that begins anew for each tile has nothing to compute
until its first loads arrive. One that stays asks for the next tile's while it ends the last. The tiles, and the order
of sums in them, are those of `tile_map`: the bits are the same. Rejected: taking the next tile from an atomic counter,
which balances better but needs the counter zeroed by another launch.

Legend: L groups, M rows of a tile.
"""

from functools import lru_cache

import torch

from crossdock._triton import tl, triton
from crossdock.gemm import configs
from crossdock.gemm.configs import TileConfig


def programs(tile: TileConfig, tiles: int, device: torch.device) -> int:
    """How many programs to launch for at most `tiles` tiles: two small ones a multiprocessor, or one large one."""
    return min(tiles, _multiprocessors(device) * (2 if tile.num_warps <= 4 else 1))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Of an interpreted kernel's device, which has none, as many as Hopper's."""
    limits = configs.TARGETS["sm_90"] if device.type == "cpu" else configs.limits_of(device)
    return limits.multiprocessors


@triton.jit
def scan_groups(ends_ptr, L, slab, BLOCK_M: tl.constexpr, L_POW2: tl.constexpr, MASKED: tl.constexpr):
    """-> (first row, end row, row tiles up to here and with it) of every group; MASKED as in `tile_map`."""
    group_L = tl.arange(0, L_POW2)
    end_L = tl.load(ends_ptr + group_L, mask=group_L < L, other=0)
    if MASKED:
        start_L = group_L * slab
        end_L = start_L + tl.minimum(end_L, slab)
    else:
        start_L = tl.load(ends_ptr + group_L - 1, mask=(group_L > 0) & (group_L < L), other=0)
    tiles_L = tl.where(group_L < L, (end_L - start_L + BLOCK_M - 1) // BLOCK_M, 0)
    return start_L, end_L, tl.cumsum(tiles_L, 0)


@triton.jit
def tile_at(start_L, end_L, through_L, tile, BLOCK_M: tl.constexpr, L_POW2: tl.constexpr):
    """-> (group, first row, end row of the group) of row tile `tile`, one of the max(through_L) there are."""
    group_L = tl.arange(0, L_POW2)
    group = tl.sum((through_L <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(through_L <= tile, through_L, 0), 0)
    start = tl.sum(tl.where(group_L == group, start_L, 0), 0)
    end = tl.sum(tl.where(group_L == group, end_L, 0), 0)
    return group, start + (tile - before) * BLOCK_M, end
