"""The search behind `crossdock tune`: compile, drop, rank, time, verify. Knows no terminal and no file.

A tile is trusted only where its product has the bits of the formula's tile, so that tuning changes no result, and where
that product is close to the float32 specification, so that a compiler's fault is not taken for speed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from crossdock.cli.audit_tiles import retile
from crossdock.cli.bench.products import Product
from crossdock.errors import CrossdockError
from crossdock.gemm.candidates import Usage, candidates, over_limits, predict
from crossdock.gemm.configs import Bucket, Kind, Limits, Problem, TileConfig, formula, trial
from crossdock.gemm.hopper_launch import untuned

WORTH = 0.98  # of the formula's time, above which its tile stays: less is noise
FAR = {"fp8": 1e-3, "bf16": 1e-4, "fp32": 1e-10}  # 1 - 2<x, y> / (<x, x> + <y, y>), as DeepGEMM measures
Timer = Callable[[dict[str, Callable[[], Any]]], dict[str, float]]


@dataclass(frozen=True)
class Ranked:
    """A candidate: what the model says it takes, what its build needs, and why it was dropped ("" where it was not)."""

    tile: TileConfig
    seconds: float
    usage: Usage | None
    why: str


@dataclass
class Found:
    """What one bucket's search came to; `tile` is the formula's where nothing was faster."""

    bucket: Bucket
    tile: TileConfig
    seconds: float
    formula_seconds: float
    timed: int
    rejected: dict[TileConfig, str] = field(default_factory=dict)


def builds(problems: Iterable[Problem], limits: Limits) -> list[dict[str, Any]]:
    """Each (problem, tile) that differs as a build, as JSON for the compile workers; "build" is its name."""
    found: dict[str, dict[str, Any]] = {}
    for problem in problems:
        for tile in _considered(problem, limits):
            name = build_name(problem, tile)
            found.setdefault(name, {"build": name, "problem": vars(problem), "tile": vars(tile)})
    return list(found.values())


def build_name(problem: Problem, tile: TileConfig) -> str:
    """What tells a build from others: sizes matter only by whether blocks divide them."""
    halves = (problem.columns % tile.block_n == 0, problem.inner % tile.block_k == 0)
    return f"{problem.kind} {tile} {halves} {1 << (problem.groups - 1).bit_length()}"


def build_spec(specs: Iterable[Any], build: dict[str, Any], target: str) -> Any:
    """The kernel spec of a build: of its kind the plainest, and of those the one for the fewest targets."""
    problem, tile = Problem(**build["problem"]), TileConfig(**build["tile"])
    able = [spec for spec in specs if spec.kind == problem.kind and target in spec.targets]
    if not able:
        raise CrossdockError(f"no kernel's AUDIT list has an entry of kind {problem.kind} for {target}")

    def plainness(spec: Any) -> tuple[int, int]:
        unusual = sum(bool(spec.constexprs.get(flag)) for flag in ("GATHER", "MASKED", "POW2"))
        return unusual + (not spec.constexprs.get("K_MAJOR", True)), len(spec.targets)

    return replace(retile(min(able, key=plainness), problem, tile), config=build["build"])


def rank(problem: Problem, limits: Limits, compiled: dict[str, dict[str, Any]]) -> list[Ranked]:
    """Candidates by the cost model, fastest first, those dropped last; `compiled` has the workers' results by build."""
    bucket, ranked = Bucket.of(problem), []
    for tile in _considered(problem, limits):
        result = compiled.get(build_name(problem, tile), {})
        usage = None
        if result.get("registers") is not None:
            usage = Usage(result["registers"], result["spills"], result["shared_bytes"])
        why = result.get("why", "") or over_limits(bucket.kind, tile, limits, usage)
        ranked.append(Ranked(tile, predict(bucket, tile, limits, usage), usage, why))
    return sorted(ranked, key=lambda r: (bool(r.why), r.seconds, -r.tile.num_stages))


def own_tile(problem: Problem, limits: Limits) -> TileConfig:
    """The tile this product runs with where no table has one: the formula's, or that of Hopper's kernel."""
    if limits.target == "sm_90" and not problem.kind.startswith("fp32"):
        return untuned(problem, out_bytes=1 if problem.kind == "fp8_block_swiglu" else 2)
    return formula(Bucket.of(problem), limits)


def _considered(problem: Problem, limits: Limits) -> list[TileConfig]:
    return list(dict.fromkeys((own_tile(problem, limits), *candidates(problem.kind, limits))))


def search(product: Product, tiles: Iterable[TileConfig], own: TileConfig, timer: Timer) -> Found:
    """Verifies `own` (the formula's tile) and each of `tiles`, times those that hold, and returns the fastest.

    Raises CrossdockError where the formula's own product is far from the specification.
    """
    kind, rejected = product.problem.kind, {}
    runs = {own: _under(kind, own, product)}
    expected = runs[own]()
    off = distance(expected, product.reference())
    if not off <= FAR[kind.partition("_")[0].rstrip("_")]:
        raise CrossdockError(
            f"{Bucket.of(product.problem).key()}: the formula's tile gives a wrong product ({off:.2g})"
        )
    for tile in tiles:
        if tile == own:
            continue
        run = _under(kind, tile, product)
        try:
            why = "" if same_bits(run(), expected) else "other bits than the formula's tile"
        except Exception as error:  # a compiler or a launch may refuse a tile in any way
            why = f"cannot run: {(str(error).splitlines() or [type(error).__name__])[0][:80]}"
        if why:
            rejected[tile] = why
        else:
            runs[tile] = run
    names = {str(tile): tile for tile in runs}
    took = timer({name: runs[tile] for name, tile in names.items()})
    best = min(took, key=lambda name: took[name])
    if took[best] > WORTH * took[str(own)]:
        best = str(own)
    return Found(Bucket.of(product.problem), names[best], took[best], took[str(own)], len(runs), rejected)


def _under(kind: Kind, tile: TileConfig, product: Product) -> Callable[[], Any]:
    def run() -> Any:
        with trial(kind, tile):
            return product.call()

    return run


def same_bits(one: Any, other: Any) -> bool:
    """Whether two results (tensors, or tuples of them) are equal to the bit."""
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


def distance(one: Any, other: Any) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>) in float64 of two results, codes times their scales; NaN where one has any."""
    both = square = 0.0
    for x, y in zip(_values(one), _values(other), strict=True):
        both += 2.0 * float((x * y).sum())
        square += float((x * x).sum() + (y * y).sum())
    return 1.0 - both / square if square else 0.0


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _values(result: Any, rows: int = 4096) -> Iterator[Tensor]:
    """A result in float64, so many rows at a time."""
    codes, *scales = _tensors(result)
    for first in range(0, codes.shape[0], rows):
        value = codes[first : first + rows].double()
        if scales:
            value *= scales[0][first : first + rows].double().repeat_interleave(128, 1)[:, : value.shape[1]]
        yield value
