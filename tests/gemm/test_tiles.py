"""The bits of an output do not depend on the tile it was computed with, whatever table or formula chose it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crossdock.gemm import (
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_gemm_fp8_rowwise,
    grouped_swiglu,
    grouped_swiglu_fp8,
)
from crossdock.gemm.configs import BLOCK_K, KINDS, Kind, TileConfig, trial
from tests.gemm.cases import exact_case, exact_fp8_case

COUNTS = [20, 0, 133, 1]
SIZES = [(16, 64), (32, 256), (128, 64), (256, 128), (64, 128)]  # BLOCK_M, BLOCK_N
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, in the interpreter


def outputs(kind: Kind, flip: bool, device: torch.device) -> Callable[[], list[Tensor]]:
    """A product of `kind`; `flip` turns the order of K around and leaves everything else."""
    if kind.startswith("fp8"):
        q_RK, scale_RB, wq, wscale, ends_L = exact_fp8_case(COUNTS, 256, 640, device)
        if flip:
            q_RK, wq = (codes.view(torch.uint8).flip(-1).view(codes.dtype) for codes in (q_RK, wq))
            scale_RB, wscale = scale_RB.flip(-1), wscale.flip(-1)
        if kind == "fp8_row":
            args = q_RK, scale_RB[:, 0] if not flip else scale_RB[:, -1], wq, wscale[:, :, 0].repeat(1, 128), ends_L
            return lambda: [grouped_gemm_fp8_rowwise(*args, out_dtype=torch.float32, backend="triton")]
        args = q_RK, scale_RB, wq, wscale, ends_L
        if kind == "fp8_block":
            return lambda: [grouped_gemm_fp8(*args, out_dtype=torch.float32, backend="triton")]
        return lambda: list(grouped_swiglu_fp8(*args, out_dtype=torch.float32, backend="triton"))
    dtype = torch.float32 if kind.startswith("fp32") else torch.bfloat16
    step = BLOCK_K[kind.removesuffix("_swiglu")]
    rows_RK, weights, ends_L = exact_case(COUNTS, 140, 10 * step, dtype, device, cancel=True)
    if flip:
        rows_RK, weights = rows_RK.flip(-1), weights.flip(-1)
    product = grouped_swiglu if kind.endswith("_swiglu") else grouped_gemm
    return lambda: [product(rows_RK, weights, ends_L, backend="triton")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("poison")
def test_bits_do_not_depend_on_the_tile(kind: Kind, device: torch.device) -> None:
    call = outputs(kind, False, device)
    expected = call()
    assert all(out.float().isfinite().all() for out in expected)
    for block_m, block_n in SIZES:
        if device.type == "cuda" and (block_m < 64 or block_m * block_n > 128 * 128):
            continue  # Hopper multiplies fewer rows with another instruction, and has no registers for more
        if kind == "fp8_block_swiglu" and block_n != 128:  # its strips are the tile's width
            block_n = 128
        tile = TileConfig(block_m, block_n, BLOCK_K[kind.removesuffix("_swiglu")], num_warps=8, num_stages=2)
        with trial(kind, tile):
            for seen, want in zip(call(), expected, strict=True):
                assert torch.equal(seen.view(torch.uint8), want.view(torch.uint8)), (block_m, block_n)
    flipped = outputs(kind, True, device)()  # the inputs can tell one order of summation from another
    assert not all(map(torch.equal, (out.float() for out in flipped), (out.float() for out in expected)))
