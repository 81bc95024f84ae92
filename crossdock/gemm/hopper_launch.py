"""What the launches of Hopper's kernels share on the host: descriptors, tiles, and their `AUDIT` entries.

Descriptors are made on the host and passed by value: encoding one costs a microsecond or two a launch, and a captured
graph keeps it. Made on the device they would need scratch memory and an allocator of Triton's own.

Legend: T rows in memory, L groups, N output columns, K inner size.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock.gemm import configs
from crossdock.gemm.configs import Bucket, Kind, Problem, TileConfig
from crossdock.gemm.product_specs import PORTABLE
from crossdock.gemm.tile_map import GROUP_M, next_power_of_2

HOPPER = configs.TARGETS["sm_90"]
# For many rows in bf16: twice the portable tile, as no registers hold addresses here. In FP8 the second accumulator of
# every step takes that room.
WIDE: dict[Kind, TileConfig] = {
    "bf16": TileConfig(128, 256, 64, num_warps=8, num_stages=4),
    "bf16_swiglu": TileConfig(128, 128, 64, num_warps=8, num_stages=4),
}


def tile_of(problem: Problem, device: torch.device, out_bytes: int = 2) -> TileConfig:
    """The tuned tile where there is one, which ran as it is, else `untuned`; `out_bytes` an element."""
    return configs.tuned(problem, device) or untuned(problem, out_bytes)


@lru_cache(maxsize=4096)
def untuned(problem: Problem, out_bytes: int = 2) -> TileConfig:
    """A WIDE tile where rows are many and it divides the columns, else the formula's as far as it fits."""
    bucket, wide = Bucket.of(problem), WIDE.get(problem.kind)
    if wide is not None and bucket.rows_per_group > configs.FEW_ROWS and problem.columns % wide.block_n == 0:
        return wide
    return fitting(problem.kind, configs.formula(bucket, HOPPER), out_bytes)


def fitting(kind: Kind, tile: TileConfig, out_bytes: int) -> TileConfig:
    """The tile with as many stages as fit beside its output, which has shared memory of its own where programs stay."""
    used = tile.block_m * tile.block_n * out_bytes + configs.SPARE_SHARED
    stages = (HOPPER.shared_bytes - used) // configs.stage_bytes(kind, tile)
    return TileConfig(tile.block_m, tile.block_n, tile.block_k, tile.num_warps, max(1, min(tile.num_stages, stages)))


def describe(matrix: Tensor, rows: int, columns: int) -> Any:
    """The bulk copy's descriptor of a matrix in boxes of [rows, columns]. Raises ImportError where Triton has none."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def operands(rows_TK: Tensor, weights_LNK: Tensor, tile: TileConfig, gather: bool) -> tuple[Any, Any]:
    """The first two arguments of a launch: rows and weights as the kernels take them."""
    rows = rows_TK if gather else describe(rows_TK, tile.block_m, tile.block_k)
    return rows, describe(weights_LNK.flatten(0, 1), tile.block_n, tile.block_k)


def hopper_spec(
    name: str,
    kernel: Any,
    problem: Problem,
    element: str,
    pointers: dict[str, str],
    sizes: tuple[str, ...],
    flags: dict[str, Any],
    layout: str = "ragged",
) -> KernelSpec:
    """An `AUDIT` entry: `pointers` and `sizes` stand behind rows and weights, `flags` before the tile map's."""
    tile = tile_of(problem, PORTABLE)
    blocks = {name: size for name, size in tile.launch().items() if name.startswith("BLOCK_")}
    tile_map = {"GATHER": layout == "gather", "MASKED": layout == "masked", "L_POW2": next_power_of_2(problem.groups)}
    constexprs = {"EVEN_K": problem.inner % tile.block_k == 0} | flags | tile_map | {"GROUP_M": GROUP_M} | blocks
    boxes = {rows: f"tensordesc<{element}[{rows},{tile.block_k}]>" for rows in (tile.block_m, tile.block_n)}
    first = {"rows": f"*{element}" if layout == "gather" else boxes[tile.block_m], "weights": boxes[tile.block_n]}
    text = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
    return KernelSpec(
        name=name,
        kernel=kernel,
        config=f"{problem.kind}, {text}, L={problem.groups}, {layout}",
        signature=first | pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        needs_matrix_instruction=True,
        targets=("sm_90",),
        multiples=tuple(name for name in sizes if name in ("N", "K", "F", "D", "slab", "stride_r")),
        needs_bulk_copy=True,
    )
