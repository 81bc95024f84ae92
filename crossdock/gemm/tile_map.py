# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""Which rows a program works on when groups are ragged and only the device knows where they end.

The host may not read `ends` (it would wait for the device), so it launches an upper bound of tiles, and each program
finds its own by a scan over the groups' tile counts; those past the last leave at once. With BLOCK_M = 4:

    ends      3     3         9
    rows      a a a | | b b b b b b        (group 1 is empty)
    tiles     0 0 0 .   1 1 1 1            tile 2 holds the last 2 rows of b; programs 3 and 4 leave
                            2 2 . .

A tile never holds rows of two groups. What was rejected: padding groups to whole tiles (needs a copy of the rows, up to
20% more of them), and a second kernel that writes the map (one more launch and a round trip for some 256 integers).

Legend: L groups.
"""

from crossdock._triton import tl, triton

GROUP_M = 8  # row tiles that share a weight tile while it is in the L2 cache


def tile_bound(rows: int, groups: int, block_m: int) -> int:
    """At least as many row tiles as any split of `rows` over `groups` has: each group wastes less than one."""
    return -(-rows // block_m) + groups


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


@triton.jit
def find_tile(ends_ptr, tile, L, BLOCK_M: tl.constexpr, L_POW2: tl.constexpr):
    """-> (group, first row, end row of the group) of row tile `tile`; first >= end where there is no such tile."""
    group_L = tl.arange(0, L_POW2)
    end_L = tl.load(ends_ptr + group_L, mask=group_L < L, other=0)
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
