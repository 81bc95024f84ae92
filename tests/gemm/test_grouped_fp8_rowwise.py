"""The FP8 product with one scale a row and one an output column, against float64; and why it adds up every 128."""

import pytest
import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.gemm import grouped_gemm_fp8_rowwise, quantize_whole_rows
from tests.gemm.cases import assert_fp8_close_to_float64, ends_of

BACKENDS = ["torch", "triton"]
CASES = [  # rows of each group, N, K
    ([1], 1, 1),
    ([3, 0, 70, 1, 0], 130, 300),
    ([0, 0], 128, 128),
    ([129, 0, 64, 2], 33, 65),
    ([300, 1], 140, 256),
]


def case(counts: list[int], columns: int, inner: int, device: torch.device) -> list[Tensor]:
    """q_RK, scale_R, wq_LNK, wscale_LN, ends_L, with every scale 10^-3 ... 10^3: a misplaced one shows."""
    generator = torch.Generator().manual_seed(sum(counts) * 10007 + columns * 101 + inner)
    q_RK, scale_R = quantize_whole_rows(torch.randn(sum(counts), inner, generator=generator))
    wq_LNK, wscale_LN = quantize_whole_rows(torch.randn(len(counts), columns, inner, generator=generator))
    scale_R *= 10 ** (6 * torch.rand(scale_R.shape, generator=generator) - 3)
    wscale_LN *= 10 ** (6 * torch.rand(wscale_LN.shape, generator=generator) - 3)
    return [tensor.to(device) for tensor in (q_RK, scale_R, wq_LNK, wscale_LN, ends_of(counts, device))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counts", "columns", "inner"), CASES)
@pytest.mark.usefixtures("poison")
def test_against_float64(backend: str, counts: list[int], columns: int, inner: int, device: torch.device) -> None:
    args = case(counts, columns, inner, device)
    for out_dtype in (torch.float32, torch.bfloat16):
        out_RN = grouped_gemm_fp8_rowwise(*args, out_dtype=out_dtype, backend=backend)
        assert out_RN.dtype == out_dtype and out_RN.shape == (sum(counts), columns)
        assert_fp8_close_to_float64(out_RN, args)
        assert torch.equal(out_RN, grouped_gemm_fp8_rowwise(*args, out_dtype=out_dtype, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_spoils_itself_only(backend: str, device: torch.device) -> None:
    args = case([2, 3], 130, 300, device)
    clean = grouped_gemm_fp8_rowwise(*args, out_dtype=torch.float32, backend=backend)
    args[1][3] = float("nan")
    args[3][0, 5] = float("nan")
    out_RN = grouped_gemm_fp8_rowwise(*args, out_dtype=torch.float32, backend=backend)
    assert out_RN[3].isnan().all() and out_RN[:2, 5].isnan().all()
    out_RN[3], out_RN[:2, 5] = clean[3], clean[:2, 5]
    assert torch.equal(out_RN, clean)


def test_layouts(device: torch.device) -> None:
    q_RK, scale_R, wq_LNK, wscale_LN, ends_L = case([3, 0, 9], 140, 260, device)
    expected = grouped_gemm_fp8_rowwise(q_RK, scale_R, wq_LNK, wscale_LN, ends_L, backend="triton")
    every_other_R = torch.stack([scale_R, scale_R], 1)[:, 0]
    columns_LN = wscale_LN.t().contiguous().t()
    every_other_L = torch.stack([ends_L, ends_L], 1)[:, 0]
    seen = grouped_gemm_fp8_rowwise(q_RK, every_other_R, wq_LNK, columns_LN, every_other_L, backend="triton")
    assert torch.equal(seen, expected)


def test_bad_arguments() -> None:
    q_RK, scale_R, wq_LNK, wscale_LN, ends_L = case([2, 3], 130, 260, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"scale_R must have shape \(5,\) \(one scale per row of .*, found \(5, 1\)"):
        grouped_gemm_fp8_rowwise(q_RK, scale_R[:, None], wq_LNK, wscale_LN, ends_L)
    with pytest.raises(ConfigError, match=r"wscale_LN must have shape \(2, 130\) \(one scale per output column"):
        grouped_gemm_fp8_rowwise(q_RK, scale_R, wq_LNK, wscale_LN[:, :1], ends_L)
    with pytest.raises(ConfigError, match=r"wq_LNK must be torch.float8_e4m3fn .*, found torch.float32"):
        grouped_gemm_fp8_rowwise(q_RK, scale_R, wq_LNK.float(), wscale_LN, ends_L)
    with pytest.raises(ConfigError, match=r"out_dtype must be one of .*, found torch.float64"):
        grouped_gemm_fp8_rowwise(q_RK, scale_R, wq_LNK, wscale_LN, ends_L, torch.float64)
