"""Which builds of a grouped product `crossdock audit` makes: one for each tile that production shapes get.

A kernel module's AUDIT list names a kernel and its flags with one tile; here every tile takes that one's place that
configs.py gives on a target to a shape of shapes.py. Shapes that share a tile share a build, as sizes are arguments of
a launch; of the numbers of groups, which only set how far a program looks for its own, the largest stands for all.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from crossdock._audit_spec import KernelSpec
from crossdock.cli.shapes import production

SIZE_FLAGS = ("ALIGNED", "EVEN_N", "EVEN_K")  # true of all production shapes, so not worth a word


def expand(specs: Iterable[KernelSpec]) -> list[KernelSpec]:
    """The specs, those with a `kind` once for each production tile; no build twice."""
    found: dict[tuple[str, str], KernelSpec] = {}
    for spec in specs:
        for each in tiled(spec) if spec.kind else (spec,):
            if (each.name, each.config) in found and found[each.name, each.config].signature != each.signature:
                each = replace(each, config=f"{each.config}, {spec.config}")
            known = found.get((each.name, each.config), each)
            targets = tuple(dict.fromkeys((*known.targets, *each.targets)))
            found[each.name, each.config] = replace(known, targets=targets)
    return list(found.values())


def tiled(spec: KernelSpec) -> Iterator[KernelSpec]:
    """One spec for each production tile of each of its targets."""
    from crossdock.gemm.configs import TARGETS, Bucket, formula

    for target in spec.targets:
        largest: dict[Any, Any] = {}
        for problem in production(spec.kind):  # type: ignore[arg-type]
            tile = formula(Bucket.of(problem), TARGETS[target])
            if tile not in largest or problem.groups > largest[tile].groups:
                largest[tile] = problem
        for tile, problem in largest.items():
            yield replace(retile(spec, problem, tile), targets=(target,))


def retile(spec: KernelSpec, problem: Any, tile: Any) -> KernelSpec:
    """The same kernel with another tile, and what follows from it and the problem's sizes."""
    sizes = {
        "EVEN_N": problem.columns % tile.block_n == 0,
        "EVEN_K": problem.inner % tile.block_k == 0,
        "L_POW2": 1 << (problem.groups - 1).bit_length(),
    } | {name: size for name, size in tile.launch().items() if name.startswith("BLOCK_")}
    constexprs = spec.constexprs | {name: size for name, size in sizes.items() if name in spec.constexprs}
    flags = [name.lower() for name, value in constexprs.items() if value is True and name not in SIZE_FLAGS]
    boxes = {"rows": tile.block_m, "weights": tile.block_n}  # of bulk copies, whose types hold their size
    signature = {
        name: re.sub(r"\[\d+, ?\d+\]", f"[{boxes[name]},{tile.block_k}]", kind) if "tensordesc" in kind else kind
        for name, kind in spec.signature.items()
    }
    text = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
    return replace(
        spec,
        config=", ".join((spec.kind, text, *flags)),
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
