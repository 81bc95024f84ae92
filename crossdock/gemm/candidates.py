"""Which tiles could serve a grouped product, and in what order they are worth trying.

The cost model is a roofline by waves. With t tiles, m multiprocessors and r programs on each of them at once:

    time = waves * (time of r tiles on one multiprocessor + FILL_S),    waves = ceil(t / (m * r))
    time of r tiles = max(operations / matrix rate, bytes read / rate of loads)
    rate of loads = min(share of the L2's rate, bytes in flight / LATENCY_S)

and never less than the bytes that must come from memory, at the memory's rate. Bytes in flight are what the stages of
the r programs hold (Little's law): that is what makes a deep pipeline pay while rows are few. r is what registers and
shared memory allow. Rates are data-sheet figures of one device a target; only the order of candidates is used, and what
is timed decides. Rejected: a model fitted to timings, which would need them for every device first.

Legend: L groups, N output columns, K inner size.
"""

from dataclasses import dataclass

from crossdock.gemm.configs import BLOCK_K, ELEMENT_BYTES, Bucket, Kind, Limits, TileConfig, check_tile, stage_bytes

LATENCY_S = 1e-6  # from asking for a line of memory to having it, under load
FILL_S = 2e-6  # a tile's own: finding its group, filling the pipeline, storing
REGISTERS, REGISTERS_A_THREAD, OTHER_REGISTERS = 65536, 255, 48  # of a multiprocessor; of a thread; beside accumulators
MAX_STAGES = 6


@dataclass(frozen=True)
class Rates:
    """Operations a second in bf16 and fp8, bytes a second of memory and of the L2, for one whole device."""

    bf16: float
    fp8: float
    memory: float
    cache: float


RATES = {
    "sm_90": Rates(0.99e15, 1.98e15, 4.0e12, 7e12),
    "sm_100": Rates(2.25e15, 4.5e15, 8.0e12, 12e12),
    "gfx942": Rates(1.31e15, 2.61e15, 5.3e12, 10e12),
}


@dataclass(frozen=True)
class Usage:
    """What a compiler reports of a build: registers a thread, spills, bytes of shared memory a program."""

    registers: int
    spills: int
    shared_bytes: int


def candidates(kind: Kind, limits: Limits) -> list[TileConfig]:
    """Every tile of `kind` that the device's shared memory and registers could hold, before anything is compiled.

    64 rows at least and 4 or 8 warps, because Hopper's matrix instruction for a warp group takes no less.
    """
    found = []
    for block_m in (64, 128, 256):
        for block_n in (64, 128, 256):
            for warps in (4, 8):
                for stages in range(1, 4) if limits.is_amd else range(2, MAX_STAGES + 1):
                    tile = TileConfig(block_m, block_n, BLOCK_K[kind.removesuffix("_swiglu")], warps, stages)
                    if is_kind(kind, tile) and not over_limits(kind, tile, limits):
                        found.append(tile)
    return found


def is_kind(kind: Kind, tile: TileConfig) -> bool:
    """Whether kernels of `kind` can run with the tile at all."""
    try:
        check_tile(kind, tile)
    except ValueError:
        return False
    return True


def over_limits(kind: Kind, tile: TileConfig, limits: Limits, usage: Usage | None = None) -> str:
    """Why the device cannot run the tile well, "" where it can: by arithmetic, and by a build's usage where given."""
    if usage is not None:
        if usage.spills:
            return f"spills ({usage.spills})"
        shared, what = usage.shared_bytes, "shared memory"
    else:
        stages = tile.num_stages - 1 if limits.is_amd else tile.num_stages
        shared, what = max(stages, 1) * stage_bytes(kind, tile), "shared memory of the pipeline"
        if _accumulators(kind, tile, limits) + OTHER_REGISTERS > REGISTERS_A_THREAD:
            return f"{_accumulators(kind, tile, limits)} registers for accumulators alone"
    if shared > limits.shared_bytes:
        return f"{what} {shared} > {limits.shared_bytes} bytes"
    return ""


def predict(bucket: Bucket, tile: TileConfig, limits: Limits, usage: Usage | None = None) -> float:
    """Seconds by the cost model above, rows spread evenly over groups; a build's `usage` makes r exact."""
    rates = RATES.get(limits.target, RATES["sm_90"])
    base = bucket.kind.removesuffix("_swiglu")
    halves, size = 2 if base != bucket.kind else 1, ELEMENT_BYTES[base]
    matrix_rate = rates.fp8 if size == 1 else rates.bf16 if size == 2 else rates.bf16 / 15
    tiles = bucket.groups * -(-bucket.rows_per_group // tile.block_m) * -(-bucket.columns // tile.block_n)
    resident = _resident(bucket.kind, tile, limits, usage)
    here = min(resident, -(-tiles // limits.multiprocessors))  # a last, only wave is not full
    loaded = here * (tile.block_m + halves * tile.block_n) * bucket.inner * size
    operations = here * 2.0 * tile.block_m * tile.block_n * halves * bucket.inner
    in_flight = here * max(tile.num_stages - 1, 0.5) * stage_bytes(bucket.kind, tile)
    load_rate = min(rates.cache / limits.multiprocessors, in_flight / LATENCY_S)
    together = max(operations / (matrix_rate / limits.multiprocessors), loaded / load_rate)
    waves = -(-tiles // (limits.multiprocessors * resident))
    rows = bucket.groups * bucket.rows_per_group
    read = size * bucket.inner * (rows + bucket.groups * halves * bucket.columns)
    return max(waves * (together + FILL_S), (read + 2 * rows * bucket.columns) / rates.memory)


def _resident(kind: Kind, tile: TileConfig, limits: Limits, usage: Usage | None) -> int:
    """Programs that one multiprocessor holds at once."""
    threads = tile.num_warps * (64 if limits.is_amd else 32)
    registers = usage.registers if usage else _accumulators(kind, tile, limits) + OTHER_REGISTERS
    shared = usage.shared_bytes if usage else tile.num_stages * stage_bytes(kind, tile)
    vector_file = REGISTERS * 2 if limits.is_amd else REGISTERS
    by_registers = vector_file // (threads * max(registers, 32))
    return max(1, min(by_registers, limits.shared_bytes // max(shared, 1), 4))


def _accumulators(kind: Kind, tile: TileConfig, limits: Limits) -> int:
    """Registers a thread for float32 sums; twice where a block's own sum is kept beside the total."""
    base = kind.removesuffix("_swiglu")
    held = (2 if base != kind else 1) + (1 if base.startswith("fp8") else 0)
    return held * tile.block_m * tile.block_n // (tile.num_warps * (64 if limits.is_amd else 32))
