"""Which tile a grouped product runs with: the user's table, else the package's, else a formula over device and shape.

A GPU that nobody has tuned for works at once: the formula needs only what the driver says of it. A table (tables.py,
written by `crossdock tune`) refines single shapes. It speaks for exactly the shape it was measured with, in powers of
two of the groups and of the rows a group; snapping to the nearest entry was rejected, as a tile that is good for one N
and K can be bad for the next.

What must not change with the number of rows is no choice: the length of a step along K (BLOCK_K) is fixed by the kind
of product, and so is BLOCK_N where the product ends in a quantisation per 128. So every element is summed in one order
whatever tile it falls into, and a table changes the time and not the bits (`crossdock tune` stores no tile before it
has checked that).

The choice costs one look into a dictionary a launch, waits for no device, and reads files once, at the first launch.

Legend: R rows, L groups (expert slots on this rank), N output columns, K inner size.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from crossdock._audit_spec import SHARED_BYTES
from crossdock.errors import ConfigError
from crossdock.gemm import tables

Kind = Literal["bf16", "fp32", "fp8_block", "fp8_row", "bf16_swiglu", "fp32_swiglu", "fp8_block_swiglu"]
KINDS: tuple[Kind, ...] = ("bf16", "fp32", "fp8_block", "fp8_row", "bf16_swiglu", "fp32_swiglu", "fp8_block_swiglu")
BLOCK_K: dict[str, int] = {"bf16": 64, "fp32": 16, "fp8_block": 128, "fp8_row": 128}
ELEMENT_BYTES: dict[str, int] = {"bf16": 2, "fp32": 4, "fp8_block": 1, "fp8_row": 1}
FEW_ROWS = 64  # rows a group up to which streaming the weights, and not the matrix units, sets the time
SPARE_SHARED = 2048  # bytes of shared memory left for barriers and for what Triton adds
SIZES = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
PACKAGED = Path(__file__).parents[1] / "data" / "tuned"


@dataclass(frozen=True)
class Problem:
    """One grouped product; `rows` is the host's upper bound, since only the device knows the groups' sizes.

    For the fused kinds, `*_swiglu`, `columns` counts gate columns: half of what the weights have.
    """

    kind: Kind
    rows: int
    groups: int
    columns: int
    inner: int


@dataclass(frozen=True)
class TileConfig:
    """Rows and columns of a tile, step along K, warps and stages of the load pipeline.

    For the fused kinds block_n counts gate columns; the program computes as many up columns.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Bucket:
    """What a choice depends on: the shape, with groups and rows a group rounded up to powers of two."""

    kind: Kind
    columns: int
    inner: int
    groups: int
    rows_per_group: int

    @classmethod
    def of(cls, problem: Problem) -> "Bucket":
        """The bucket a problem falls into; no rows and no groups count as one."""
        groups = max(problem.groups, 1)
        rows = -(-max(problem.rows, 1) // groups)
        return cls(problem.kind, problem.columns, problem.inner, 1 << (groups - 1).bit_length(),
                   1 << (rows - 1).bit_length())  # fmt: skip

    def key(self) -> str:
        """Its name in a table: `bf16 N=4096 K=7168 L=32 R/L=8`."""
        return f"{self.kind} N={self.columns} K={self.inner} L={self.groups} R/L={self.rows_per_group}"


@dataclass(frozen=True)
class Limits:
    """What a formula may know of a device: its kind ("sm_90", "gfx942"), multiprocessors, shared bytes a block."""

    target: str
    multiprocessors: int
    shared_bytes: int

    @property
    def is_amd(self) -> bool:
        """Whether warps have 64 lanes and the last stage of a pipeline waits in registers."""
        return self.target.startswith("gfx")


MULTIPROCESSORS = {"sm_90": 132, "sm_100": 148, "gfx942": 304}
TARGETS = {target: Limits(target, MULTIPROCESSORS[target], shared) for target, shared in SHARED_BYTES.items()}


def choose(problem: Problem, device: torch.device) -> TileConfig:
    """The tile for `problem` on `device`; on a CPU, where kernels are interpreted, what the formula says of sm_90."""
    return tuned(problem, device) or _by_formula(Bucket.of(problem), device)


def tuned(problem: Problem, device: torch.device) -> TileConfig | None:
    """The tile that is on trial or that a table has; None where the formula has to say."""
    if _trials and (tile := _trials.get(problem.kind)) is not None:
        return tile
    return None if device.type == "cpu" else _in_tables(Bucket.of(problem), device)


@lru_cache(maxsize=4096)
def _in_tables(bucket: Bucket, device: torch.device) -> TileConfig | None:
    return _tuned(torch.cuda.get_device_name(device)).get(bucket.key())


@lru_cache(maxsize=4096)
def _by_formula(bucket: Bucket, device: torch.device) -> TileConfig:
    return formula(bucket, TARGETS["sm_90"] if device.type == "cpu" else limits_of(device))


def formula(bucket: Bucket, limits: Limits) -> TileConfig:
    """The tile by rows a group and by what fits the device.

    Few rows: 64 of them a tile, two programs a multiprocessor, and as many bytes in flight as shared memory holds, as
    the weights' stream is the limit. Many rows: 128 and eight warps, which reads each weight half as often. float32
    runs without tensor cores and needs registers for both operands; a fused product keeps two accumulators, hence 64.
    On AMD two stages, and one where FP8 is widened to float16 on the way (gfx942 has no e4m3 of this form) and would
    spill.
    """
    base = bucket.kind.removesuffix("_swiglu")
    fused = base != bucket.kind
    if base == "fp32":
        return TileConfig(64, 64, BLOCK_K[base], num_warps=4, num_stages=2 if limits.is_amd else 3)
    block_m, warps = 64, 8 if fused else 4
    if bucket.rows_per_group > FEW_ROWS and not fused:
        block_m, warps = 128, 8
    tile = TileConfig(block_m, 128, BLOCK_K[base], warps, num_stages=1)
    resident = 2 if warps == 4 else 1
    fitting = (limits.shared_bytes // resident - SPARE_SHARED) // stage_bytes(bucket.kind, tile)
    stages = (1 if base != "bf16" and not fused else 2) if limits.is_amd else max(1, min(fitting, 4))
    return TileConfig(block_m, 128, tile.block_k, warps, stages)


def stage_bytes(kind: Kind, tile: TileConfig) -> int:
    """Shared memory of one stage of the pipeline: a step's rows and weights."""
    base = kind.removesuffix("_swiglu")
    columns = tile.block_n * (2 if base != kind else 1)
    return (tile.block_m + columns) * tile.block_k * ELEMENT_BYTES[base]


def limits_of(device: torch.device) -> Limits:
    """What the driver says of a GPU. Initialises CUDA, which a tensor on the device has done already."""
    found: Any = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    target = str(found.gcnArchName).partition(":")[0] if amd else f"sm_{found.major}{found.minor}"
    shared = getattr(found, "shared_memory_per_block_optin", 0) or getattr(found, "shared_memory_per_block", 49152)
    return Limits(target, found.multi_processor_count, shared)


def check_tile(kind: Kind, tile: TileConfig) -> None:
    """Raises ConfigError for a tile no kernel of `kind` can run with the same bits as the formula's."""
    base = kind.removesuffix("_swiglu")
    sizes = (tile.block_m, tile.block_n, tile.num_warps)
    wrong = [size for size in sizes if size < 1 or size & (size - 1)]
    if wrong or tile.num_stages < 1 or tile.block_m < 16 or tile.block_n < 16:
        raise ConfigError(f"a {kind} tile needs powers of two, 16 rows and columns and 1 stage at least, found {tile}")
    if tile.block_k != BLOCK_K[base]:
        raise ConfigError(f"a {kind} tile must have block_k {BLOCK_K[base]}, found {tile.block_k}")
    if kind == "fp8_block_swiglu" and tile.block_n != 128:
        raise ConfigError(f"a {kind} tile must have block_n 128, as the scales it writes, found {tile.block_n}")


_trials: dict[str, TileConfig] = {}
_given: list[Path] = []  # from `load_table`; a later one is asked first


@contextmanager
def trial(kind: Kind, tile: TileConfig) -> Iterator[None]:
    """Within, `choose` gives `tile` for every problem of `kind`: how a candidate is timed. For one thread at a time."""
    _trials[kind] = tile
    try:
        yield
    finally:
        del _trials[kind]


def on_trial(kind: Kind) -> bool:
    """Whether `choose` gives a candidate for `kind` now, so that its failure is the tuner's to see."""
    return kind in _trials


def load_table(path: Path | str) -> None:
    """Takes tiles from this file before any other, from now on.

    Entries for other devices, kernels or versions of Triton are not used. Raises ConfigError where the file cannot be
    read or holds a tile that cannot be.
    """
    for versions in tables.read(Path(path)).values():
        for entries in versions.values():
            _tiles(entries)
    _given.append(Path(path))
    forget()


def forget() -> None:
    """Makes the next choice read the files anew."""
    _in_tables.cache_clear()
    _by_formula.cache_clear()
    _tuned.cache_clear()


@lru_cache(maxsize=64)
def _tuned(device_name: str) -> dict[str, TileConfig]:
    """All tiles that hold for this device, Triton and source: packaged, over them the user's, over them given ones.

    A file that cannot be used is named once and passed over: a launch must not fail for want of a faster tile.
    """
    found: dict[str, TileConfig] = {}
    for path in (*sorted(PACKAGED.glob("*.json")), tables.user_path(), *_given):
        try:
            if path is not None and path.is_file():
                found |= _tiles(tables.holding(path, device_name))
        except (ConfigError, OSError) as error:  # OSError: a home that may not be searched
            warnings.warn(f"tuned tiles are not used: {error}", stacklevel=2)
    return found


def _tiles(entries: dict[str, tables.Entry]) -> dict[str, TileConfig]:
    """A table's entries as tiles. Raises ConfigError for a key of no kind, a size missing, or a tile that cannot be."""
    found = {}
    for key, entry in entries.items():
        kind, missing = key.partition(" ")[0], [name for name in SIZES if name not in entry]
        if kind not in KINDS or missing:
            raise ConfigError(f"entry {key!r} of a table of tiles has {'no ' + missing[0] if missing else 'no kind'}")
        found[key] = TileConfig(*(int(entry[name]) for name in SIZES))
        check_tile(kind, found[key])
    return found
