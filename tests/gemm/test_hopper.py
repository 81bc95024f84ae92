"""Hopper's kernels have the portable kernels' bits; they are taken where they can run, and a failure costs speed only.

Without a GPU they are interpreted. Either way few programs run, so that each takes several tiles.
"""

import importlib
import json
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import HAS_TRITON
from crossdock.errors import ConfigError
from crossdock.gemm import hopper, persistent_map, quantize_blocks, quantize_rows, quantize_whole_rows
from crossdock.gemm.configs import Kind, Problem, TileConfig, trial
from crossdock.gemm.grouped_fp8_hopper_kernel import grouped_gemm_fp8_hopper
from crossdock.gemm.grouped_fp8_kernel import grouped_gemm_fp8_triton
from crossdock.gemm.grouped_fp8_swiglu_hopper_kernel import grouped_swiglu_fp8_hopper
from crossdock.gemm.grouped_fp8_swiglu_kernel import grouped_swiglu_fp8_triton
from crossdock.gemm.grouped_hopper_kernel import grouped_gemm_hopper
from crossdock.gemm.grouped_kernel import grouped_gemm_triton
from crossdock.gemm.grouped_swiglu_hopper_kernel import grouped_swiglu_hopper
from crossdock.gemm.grouped_swiglu_kernel import grouped_swiglu_triton
from crossdock.gemm.hopper_launch import HOPPER, WIDE, fitting, tile_of

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNTS = [  # rows of each group
    [1],
    [0, 0],
    [3, 0, 70, 1, 0],
    [129, 0, 64, 2],
]
MODULES = [
    "grouped_hopper_kernel",
    "grouped_fp8_hopper_kernel",
    "grouped_swiglu_hopper_kernel",
    "grouped_fp8_swiglu_hopper_kernel",
]

runs = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE.type == "cuda" and not hopper.is_hopper(DEVICE)), reason="needs Hopper or the interpreter"
)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent_map, "_multiprocessors", lambda device: 3)
    monkeypatch.setattr(hopper, "_given_up", set())


def floats(counts: list[int], columns: int, inner: int, dtype: torch.dtype) -> list[Tensor]:
    """rows_RK, weights_LNK, ends_L."""
    generator = torch.Generator().manual_seed(sum(counts) * 10007 + columns * 101 + inner)
    rows_RK = torch.randn(sum(counts), inner, generator=generator)
    weights_LNK = torch.randn(len(counts), columns, inner, generator=generator)
    ends_L = torch.tensor(counts).cumsum(0).to(torch.int32)
    return [rows_RK.to(DEVICE, dtype), weights_LNK.to(DEVICE, dtype), ends_L.to(DEVICE)]


def codes(counts: list[int], columns: int, inner: int) -> list[Tensor]:
    """q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L; scales 10^-3 ... 10^3 apart, as a misplaced one then shows."""
    rows_RK, weights_LNK, ends_L = floats(counts, columns, inner, torch.float32)
    q_RK, scale_RB = quantize_rows(rows_RK)
    wq_LNK, wscale_LBB = quantize_blocks(weights_LNK)
    generator = torch.Generator().manual_seed(inner)
    for scale in (scale_RB, wscale_LBB):
        scale *= 10 ** (6 * torch.rand(scale.shape, generator=generator).to(DEVICE) - 3)
    return [q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L]


def gathered(counts: list[int]) -> Tensor:
    """Row ids in disorder, with repeats; int32 and, for an odd number of rows, int64."""
    rows = sum(counts)
    ids = torch.randint(0, max(rows, 1), (rows,), generator=torch.Generator().manual_seed(rows))
    return ids.to(DEVICE, torch.int64 if rows % 2 else torch.int32)


@runs
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.usefixtures("poison")
def test_bits_of_the_portable_product(counts: list[int], gather: bool) -> None:
    for columns, inner, dtype in ((144, 200, torch.bfloat16), (16, 64, torch.float16)):
        args: list[Any] = [*floats(counts, columns, inner, dtype), gathered(counts) if gather else None]
        assert torch.equal(grouped_gemm_hopper(*args), grouped_gemm_triton(*args))


@runs
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.usefixtures("poison")
def test_bits_of_the_portable_fp8_product(counts: list[int], gather: bool) -> None:
    row_ids_R = gathered(counts) if gather else None
    for columns, inner in ((144, 304), (16, 128)):
        q_RK, scale_RB, *rest = codes(counts, columns, inner)
        portable = grouped_gemm_fp8_triton(q_RK, scale_RB, *rest, torch.bfloat16, row_ids_R)
        column_major_RB = scale_RB.t().contiguous().t()
        for scale in (scale_RB, column_major_RB):
            assert torch.equal(grouped_gemm_fp8_hopper(q_RK, scale, *rest, torch.bfloat16, row_ids_R), portable)


@runs
@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.usefixtures("poison")
def test_bits_of_the_portable_fp8_product_with_other_tiles(columns: int) -> None:
    """Tiles that share a block of weights' scales, and tiles that span two."""
    args = (*codes([3, 65], 336, 144), torch.float32)
    with trial("fp8_block", TileConfig(64, columns, 128, 4, 2)):
        seen = grouped_gemm_fp8_hopper(*args)
    assert torch.equal(seen, grouped_gemm_fp8_triton(*args))


@runs
@pytest.mark.usefixtures("poison")
def test_bits_of_the_portable_fp8_product_with_scales_per_row() -> None:
    rows_RK, weights_LNK, ends_L = floats([70, 0, 3], 48, 144, torch.float32)
    args = (*quantize_whole_rows(rows_RK), *quantize_whole_rows(weights_LNK), ends_L, torch.float32)
    assert torch.equal(grouped_gemm_fp8_hopper(*args), grouped_gemm_fp8_triton(*args))


@runs
def test_bits_of_the_portable_masked_product() -> None:
    counts, slab = (
        torch.tensor([5, 0, 70, 99], dtype=torch.int32, device=DEVICE),
        70,
    )  # a count above the slab is the slab
    rows_RK, weights_LNK, _ = floats([70] * 4, 48, 80, torch.float16)
    used = (torch.arange(slab, device=DEVICE) < counts[:, None]).flatten()
    args = (rows_RK, weights_LNK, counts)
    assert torch.equal(grouped_gemm_hopper(*args, slab=slab)[used], grouped_gemm_triton(*args, slab=slab)[used])
    quantised = (*quantize_rows(rows_RK), *quantize_blocks(weights_LNK), counts, torch.bfloat16)
    seen, expected = (f(*quantised, slab=slab) for f in (grouped_gemm_fp8_hopper, grouped_gemm_fp8_triton))
    assert torch.equal(seen[used], expected[used])


@runs
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.usefixtures("poison")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_bits_of_the_portable_first_half(gather: bool) -> None:
    counts = [3, 0, 70, 1, 0]
    row_ids_R = gathered(counts) if gather else None
    args = floats(counts, 2 * 144, 80, torch.bfloat16)
    assert torch.equal(grouped_swiglu_hopper(*args, row_ids_R), grouped_swiglu_triton(*args, row_ids_R))
    for pow2 in (False, True):
        quantised = (*codes(counts, 2 * 256, 144), pow2, torch.bfloat16, row_ids_R)
        for seen, expected in zip(
            grouped_swiglu_fp8_hopper(*quantised), grouped_swiglu_fp8_triton(*quantised), strict=True
        ):
            assert torch.equal(seen.view(torch.uint8), expected.view(torch.uint8))


@runs
def test_bits_on_both_sides_of_the_wide_tiles() -> None:
    """65 rows a group take a tile of 128 x 256, 64 rows one of 64 x 128; a shared row has the same bits."""
    rows_RK, weights_LNK, _ = floats([65], 256, 128, torch.bfloat16)
    assert tile_of(Problem("bf16", 65, 1, 256, 128), CPU) == WIDE["bf16"]
    assert tile_of(Problem("bf16", 64, 1, 256, 128), CPU).block_m == 64
    many, few = (
        grouped_gemm_hopper(rows_RK[:rows], weights_LNK, torch.tensor([rows], dtype=torch.int32, device=DEVICE))
        for rows in (65, 64)
    )
    assert torch.equal(many[:64], few)
    args = floats([65], 2 * 128, 64, torch.bfloat16)
    assert tile_of(Problem("bf16_swiglu", 65, 1, 128, 64), CPU) == WIDE["bf16_swiglu"]
    assert torch.equal(grouped_swiglu_hopper(*args), grouped_swiglu_triton(*args))


def test_tiles() -> None:
    """A tile on trial or of a table is taken as it is; the formula's has the stages that fit beside the output."""
    problem = Problem("bf16", 4096, 4, 4096, 4096)
    with trial("bf16", TileConfig(64, 64, 64, 4, 2)):
        assert tile_of(problem, CPU) == TileConfig(64, 64, 64, 4, 2)
    for tile in (TileConfig(256, 128, 64, 8, 6), WIDE["bf16"], TileConfig(128, 128, 64, 8, 4)):
        with trial("bf16", tile):
            assert tile_of(problem, CPU) == tile
    assert tile_of(problem, CPU) == WIDE["bf16"]
    assert fitting("bf16", TileConfig(256, 128, 64, 8, 6), 2).num_stages == 3
    assert tile_of(Problem("bf16", 4096, 4, 4096 + 128, 4096), CPU).block_n == 128  # 256 would leave half a tile idle
    assert persistent_map.programs(TileConfig(64, 128, 64, 4, 3), 100, CPU) == 6
    assert persistent_map.programs(TileConfig(128, 128, 64, 8, 3), 2, CPU) == 2


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)


def test_a_cpu_is_no_hopper() -> None:
    rows_RK, weights_LNK, _ = (tensor.to(CPU) for tensor in floats([4], 32, 64, torch.bfloat16))
    assert not hopper.is_hopper(CPU)
    assert hopper.fast_path("bf16", grouped_gemm_triton, rows_RK, weights_LNK) is grouped_gemm_triton


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hopper(monkeypatch)
    rows_RK, weights_LNK, _ = floats([4], 32, 72, torch.bfloat16)
    wide = torch.randn(2, 32, 80, dtype=torch.bfloat16, device=DEVICE)
    takes = hopper.takes
    assert takes("bf16", rows_RK, weights_LNK) and takes("bf16", rows_RK, wide[..., 8:])
    assert takes("bf16", rows_RK, wide[:1, :16, 8:])  # one group stands behind itself
    assert not takes("bf16", rows_RK, wide[:, :16, 8:])  # groups apart
    assert not takes("bf16", rows_RK, weights_LNK[:, :24])  # 24 columns
    assert not takes("bf16", rows_RK, weights_LNK.transpose(1, 2).contiguous().transpose(1, 2))
    assert not takes("bf16", rows_RK[:, 4:], wide[..., 12:])  # 8 bytes past a multiple of 16
    assert not takes("bf16", rows_RK[:, :60].contiguous(), weights_LNK[..., :60])  # rows 120 bytes apart
    assert not takes("bf16", rows_RK[:0], weights_LNK)
    assert not takes("fp32", rows_RK.float(), weights_LNK.float())
    half = torch.randn(1, 256, 72, dtype=torch.bfloat16, device=DEVICE)
    assert takes("bf16_swiglu", rows_RK, half[:, :32]) and not takes("bf16_swiglu", rows_RK, half[:, :48])
    assert takes("fp8_block_swiglu", rows_RK, half) and not takes("fp8_block_swiglu", rows_RK, half[:, :128])


@runs
@pytest.mark.parametrize("kind", ["bf16", "fp8_block", "fp8_row", "bf16_swiglu", "fp8_block_swiglu"])
def test_the_path_of_each_kind(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fast_path` gives a launch of the portable one's arguments, and none of it runs portably."""
    pretend_hopper(monkeypatch)

    def portable(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("ran portably")

    rows_RK, weights_LNK, ends_L = floats([2, 1], 256, 128, torch.bfloat16)
    if kind in ("bf16", "bf16_swiglu"):
        out = hopper.fast_path(kind, portable, rows_RK, weights_LNK)(rows_RK, weights_LNK, ends_L)
        assert out.shape == (3, 256 if kind == "bf16" else 128)
        return
    if kind == "fp8_row":
        operands = (*quantize_whole_rows(rows_RK), *quantize_whole_rows(weights_LNK), ends_L)
    else:
        operands = (*quantize_rows(rows_RK), *quantize_blocks(weights_LNK), ends_L)
    options = (False, torch.bfloat16) if kind == "fp8_block_swiglu" else (torch.bfloat16,)
    out = hopper.fast_path(kind, portable, operands[0], operands[2])(*operands, *options)
    assert (out[0] if isinstance(out, tuple) else out).shape == (3, 128 if kind == "fp8_block_swiglu" else 256)


def test_a_failure_costs_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hopper(monkeypatch)
    attempts = []

    def broken(*args: Any) -> Tensor:
        attempts.append(args)
        raise RuntimeError("PassManager::run failed\nno such pass")

    monkeypatch.setattr(hopper, "_launch", lambda kind: broken)
    rows_RK, weights_LNK, ends_L = floats([4], 32, 64, torch.bfloat16)
    operands = (rows_RK, weights_LNK, ends_L)

    def portable(*args: Tensor) -> str:
        assert all(seen is given for seen, given in zip(args, operands, strict=True))
        return "portable"

    with pytest.warns(UserWarning, match="Hopper's kernel for bf16 products does not run here: no such pass"):
        assert hopper.fast_path("bf16", portable, rows_RK, weights_LNK)(*operands) == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper.fast_path("bf16", portable, rows_RK, weights_LNK) is portable
    assert len(attempts) == 1
    assert (
        hopper.fast_path("fp8_block", portable, rows_RK, weights_LNK) is not portable
    )  # another kind is another kernel


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ConfigError("wrong")])
def test_other_errors_are_the_callers(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hopper(monkeypatch)

    def broken() -> Tensor:
        raise error

    monkeypatch.setattr(hopper, "_launch", lambda kind: broken)
    rows_RK, weights_LNK, _ = floats([4], 32, 64, torch.bfloat16)
    with pytest.raises(type(error)):
        hopper.fast_path("bf16", grouped_gemm_triton, rows_RK, weights_LNK)()
    assert hopper.fast_path("bf16", grouped_gemm_triton, rows_RK, weights_LNK) is not grouped_gemm_triton


@pytest.mark.parametrize("module", MODULES)
def test_specs_fit_their_kernels(module: str) -> None:
    specs: list[KernelSpec] = importlib.import_module(f"crossdock.gemm.{module}").AUDIT
    for spec in specs:
        assert list(spec.signature) == list(spec.kernel.arg_names)
        assert {name for name, kind in spec.signature.items() if kind == "constexpr"} == set(spec.constexprs)
        assert spec.targets == (HOPPER.target,) and spec.needs_bulk_copy and spec.needs_matrix_instruction


COMPILE = """
import json
from crossdock.cli.audit_worker import examine
from crossdock.gemm.grouped_fp8_hopper_kernel import AUDIT
print(json.dumps(examine(AUDIT[1], "sm_90")))
"""


def test_compiled_for_sm_90() -> None:
    """Needs no device; in its own process, since here kernels may belong to the interpreter."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    build = json.loads(done.stdout)
    assert build["ok"] and build["bulk_copy"] and build["matrix_instructions"] == ["wgmma"], build
