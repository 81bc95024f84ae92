"""The masked layout: groups a fixed number of rows apart, of which only the first few are used."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.gemm import grouped_gemm, grouped_gemm_fp8, grouped_gemm_fp8_masked, grouped_gemm_masked
from crossdock.gemm.configs import TileConfig, trial
from crossdock.gemm.grouped_kernel import grouped_gemm_ref, grouped_gemm_triton
from tests.gemm.cases import ROUNDING, exact_case, exact_fp8_case, float_case, fp8_case

BACKENDS = ["torch", "triton"]
CASES = [  # rows of each group, rows of a slab, N, K
    ([1], 1, 1, 1),
    ([3, 0, 5], 5, 64, 128),
    ([70, 0, 64, 1], 70, 130, 200),
    ([0, 0], 4, 16, 16),
    ([0, 66], 130, 33, 65),
]


def slabs(rows: Tensor, counts: list[int], slab: int) -> Tensor:
    """Ragged rows in slabs, with NaN behind each group's last (0xFF bytes, in every float dtype)."""
    out = torch.full((len(counts), slab, rows.shape[1] * rows.element_size()), 0xFF, dtype=torch.uint8)
    out = out.to(rows.device).view(rows.dtype)
    start = 0
    for group, count in enumerate(counts):
        out[group, :count] = rows[start : start + count]
        start += count
    return out


def used(out_LMN: Tensor, counts: list[int]) -> Tensor:
    """The rows in use, one group behind another; the others must be as poisoned."""
    for out_MN, count in zip(out_LMN, counts, strict=True):
        assert (out_MN[count:].view(torch.uint8) == 0xFF).all()
    return torch.cat([out_MN[:count] for out_MN, count in zip(out_LMN, counts, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counts", "slab", "columns", "inner"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poison")
def test_equals_ragged(
    backend: str, counts: list[int], slab: int, columns: int, inner: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows_RK, weights_LNK, ends_L = exact_case(counts, columns, inner, dtype, device)
    counts_L = torch.tensor(counts, dtype=torch.int32, device=device)
    rows_LMK = slabs(rows_RK, counts, slab)
    out_LMN = grouped_gemm_masked(rows_LMK, weights_LNK, counts_L, backend=backend)
    assert out_LMN.shape == (len(counts), slab, columns) and out_LMN.dtype == dtype
    expected_RN = grouped_gemm(rows_RK, weights_LNK, ends_L, backend=backend)
    if backend == "triton" or dtype == torch.float32:
        assert torch.equal(used(out_LMN, counts), expected_RN)
        again_LMN = grouped_gemm_masked(rows_LMK, weights_LNK, counts_L, backend=backend)
        assert torch.equal(out_LMN.view(torch.uint8), again_LMN.view(torch.uint8))
    torch.testing.assert_close(used(out_LMN, counts), expected_RN, rtol=2 * ROUNDING[dtype] or 1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counts", "slab", "columns", "inner"), CASES)
@pytest.mark.usefixtures("poison")
def test_fp8_equals_ragged(
    backend: str, counts: list[int], slab: int, columns: int, inner: int, device: torch.device
) -> None:
    for make in (exact_fp8_case, fp8_case):
        q_RK, scale_RB, *weights, ends_L = make(counts, columns, inner, device)
        counts_L = torch.tensor(counts, dtype=torch.int32, device=device)
        rows = slabs(q_RK, counts, slab), slabs(scale_RB, counts, slab)
        out_LMN = grouped_gemm_fp8_masked(*rows, *weights, counts_L, torch.float32, backend)
        expected_RN = grouped_gemm_fp8(q_RK, scale_RB, *weights, ends_L, torch.float32, backend)
        if make is exact_fp8_case:
            assert torch.equal(used(out_LMN, counts), expected_RN)
        torch.testing.assert_close(used(out_LMN, counts), expected_RN, rtol=1e-4, atol=1e-2)


def test_reference(device: torch.device) -> None:
    rows_RK, weights_LNK, ends_L = exact_case([3, 0, 2], 20, 30, torch.float32, device)
    rows = slabs(rows_RK, [3, 0, 2], 4).flatten(0, 1)
    counts_L = torch.tensor([3, 0, 2], dtype=torch.int32, device=device)
    out_RN = grouped_gemm_ref(rows, weights_LNK, counts_L, slab=4)
    assert torch.equal(out_RN[[0, 1, 2, 8, 9]], grouped_gemm_ref(rows_RK, weights_LNK, ends_L))


def test_counts_beyond_a_slab_stay_inside_it(device: torch.device) -> None:
    """A GPU does not read the counts beforehand; a kernel that is given a wrong one must not leave its group."""
    rows_RK, weights_LNK, _ = exact_case([4, 4], 16, 64, torch.float32, device)
    whole = grouped_gemm_triton(rows_RK, weights_LNK, torch.tensor([4, 4], dtype=torch.int32, device=device), slab=4)
    beyond = grouped_gemm_triton(rows_RK, weights_LNK, torch.tensor([900, 4], dtype=torch.int32, device=device), slab=4)
    assert torch.equal(beyond, whole)


def test_offsets_beyond_int32(device: torch.device) -> None:
    """10^5 rows in slabs, most of them in pages that stay untouched, at offsets that pass 2^31."""
    slab, stride = 50_001, 21_600
    far = torch.empty(2 * slab * stride, dtype=torch.bfloat16, device=device).as_strided(
        (2, slab, 40), (slab * stride, stride, 1)
    )
    near_RK, weights_LNK, _ = exact_case([2, 3], 4, 40, torch.bfloat16, device)
    far[0, :2], far[1, :3] = near_RK[:2], near_RK[2:]
    counts_L = torch.tensor([2, 3], dtype=torch.int32, device=device)
    near_LMK = torch.zeros(2, 3, 40, dtype=torch.bfloat16, device=device)
    near_LMK[0, :2], near_LMK[1] = near_RK[:2], near_RK[2:]
    with trial("bf16", TileConfig(512, 64, 64, num_warps=8, num_stages=2)) if device.type == "cpu" else nullcontext():
        out_LMN = grouped_gemm_masked(far, weights_LNK, counts_L, backend="triton")  # tall tiles: fewer to interpret
    expected_LMN = grouped_gemm_masked(near_LMK, weights_LNK, counts_L, backend="triton")
    assert torch.equal(out_LMN[0, :2], expected_LMN[0, :2]) and torch.equal(out_LMN[1, :3], expected_LMN[1])


def test_bad_arguments() -> None:
    cpu = torch.device("cpu")
    rows_RK, weights_LNK, _ = float_case([4, 4], 8, 16, torch.float32, cpu)
    rows_LMK, counts_L = rows_RK.view(2, 4, 16), torch.tensor([3, 4], dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"rows_LMK must have 3 dimensions \[L, M, K\], found shape \(8, 16\)"):
        grouped_gemm_masked(rows_RK, weights_LNK, counts_L)
    with pytest.raises(ConfigError, match=r"rows_LMK has L=1 groups, but weights_LNK has L=2"):
        grouped_gemm_masked(rows_LMK[:1], weights_LNK, counts_L)
    with pytest.raises(ConfigError, match=r"rows_LMK has inner size K=16, but weights_LNK has K=15"):
        grouped_gemm_masked(rows_LMK, weights_LNK[:, :, 1:], counts_L)
    with pytest.raises(ConfigError, match=r"counts_L must be torch.int32 .*, found torch.int64"):
        grouped_gemm_masked(rows_LMK, weights_LNK, counts_L.long())
    with pytest.raises(ConfigError, match=r"counts_L must have shape \(2,\) \(one count for .*, found \(1,\)"):
        grouped_gemm_masked(rows_LMK, weights_LNK, counts_L[1:])
    for wrong in (5, -1):
        with pytest.raises(ConfigError, match=rf"counts_L must be in \[0, M = 4\], found {wrong} for group 1"):
            grouped_gemm_masked(rows_LMK, weights_LNK, torch.tensor([3, wrong], dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"grouped_gemm_masked has no gradient"):
        grouped_gemm_masked(rows_LMK, weights_LNK.requires_grad_(), counts_L)
    q_RK, scale_RB, *weights, _ = fp8_case([4, 4], 130, 260, cpu)
    codes = q_RK.view(2, 4, 260), scale_RB.view(2, 4, 3)
    with pytest.raises(ConfigError, match=r"scale_LMB must have shape \(2, 4, 3\) .*, found \(2, 4, 2\)"):
        grouped_gemm_fp8_masked(codes[0], codes[1][:, :, :2], *weights, counts_L)
    with pytest.raises(ConfigError, match=r"counts_L must be in \[0, M = 4\], found 9 for group 0"):
        grouped_gemm_fp8_masked(*codes, *weights, torch.tensor([9, 0], dtype=torch.int32))
