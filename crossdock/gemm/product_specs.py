"""The `AUDIT` entries of the grouped products: one for each set of flags that production uses.

An entry holds one problem's tile. `crossdock audit` puts every other tile in its place that `configs` gives production
shapes on a target (the entry's `kind` says so), so the entries differ in flags and not in sizes.
"""

from collections.abc import Iterable
from typing import Any

import torch

from crossdock._audit_spec import KernelSpec
from crossdock.gemm import configs
from crossdock.gemm.configs import Problem, TileConfig
from crossdock.gemm.tile_map import GROUP_M, next_power_of_2

PORTABLE = torch.device("cpu")  # asks for the tile of no device in particular


def tile_for(problem: Problem) -> TileConfig:
    """The tile a device gets that nothing is known of."""
    return configs.choose(problem, PORTABLE)


def product_spec(
    name: str,
    kernel: Any,
    problem: Problem,
    pointers: dict[str, str],
    sizes: Iterable[str],
    flags: dict[str, Any],
    layout: str = "ragged",
) -> KernelSpec:
    """One entry. `layout` is "ragged", "gather" or "masked".

    `pointers` gives types by name and `sizes` the names of integers; `flags` are the constexprs that stand before those
    every product has. All in the order of the kernel's arguments.
    """
    tile = tile_for(problem).launch()
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    tile_map = {"GATHER": layout == "gather", "MASKED": layout == "masked", "L_POW2": next_power_of_2(problem.groups)}
    constexprs = flags | tile_map | {"GROUP_M": GROUP_M} | tile
    shape = f"R={problem.rows} L={problem.groups} N={problem.columns} K={problem.inner}"
    return KernelSpec(
        name=name,
        kernel=kernel,
        config=f"{problem.kind}, {shape}, {layout}",
        signature=pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        needs_matrix_instruction=not problem.kind.startswith("fp32"),
        kind=problem.kind,
    )
