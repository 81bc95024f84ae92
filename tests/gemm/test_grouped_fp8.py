"""The FP8 grouped product against the float64 product of what its codes and scales stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.gemm import grouped_gemm_fp8
from tests.gemm.cases import assert_fp8_close_to_float64 as assert_close_to_float64
from tests.gemm.cases import fp8_case as case

BACKENDS = ["torch", "triton"]
CASES = [  # rows of each group, N, K
    ([1], 1, 1),
    ([0, 0, 5], 256, 128),
    ([3, 0, 70, 1, 0], 130, 300),
    ([129, 0, 64, 2], 33, 65),
    ([0, 0], 128, 128),
    ([600, 1], 300, 256),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counts", "columns", "inner"), CASES)
@pytest.mark.usefixtures("poison")
def test_against_float64(backend: str, counts: list[int], columns: int, inner: int, device: torch.device) -> None:
    args = case(counts, columns, inner, device)
    for out_dtype in (torch.float32, torch.bfloat16):
        out_RN = grouped_gemm_fp8(*args, out_dtype=out_dtype, backend=backend)
        assert out_RN.dtype == out_dtype and out_RN.shape == (sum(counts), columns)
        assert_close_to_float64(out_RN, args)
        assert torch.equal(out_RN, grouped_gemm_fp8(*args, out_dtype=out_dtype, backend=backend))


@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 63, 64, 65]), min_size=1, max_size=9),
    columns=st.integers(1, 260),
    inner=st.integers(1, 260),
)
@settings(max_examples=10, deadline=None)
def test_any_sizes(counts: list[int], columns: int, inner: int) -> None:
    args = case(counts, columns, inner, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for backend in BACKENDS:
        assert_close_to_float64(grouped_gemm_fp8(*args, out_dtype=torch.float32, backend=backend), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_company(backend: str, device: torch.device) -> None:
    """A row alone, in its group, and in a batch large enough for the other tile height has the same bits."""
    q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L = case([200, 0, 71], 130, 300, device)
    weights = (wq_LNK, wscale_LBB)
    whole_RN = grouped_gemm_fp8(q_RK, scale_RB, *weights, ends_L, torch.float32, backend)
    for row, group in ((0, 0), (63, 0), (64, 0), (199, 0), (200, 2), (270, 2)):
        alone_L = torch.tensor([int(other >= group) for other in range(3)], dtype=torch.int32, device=device)
        one = slice(row, row + 1)
        alone_RN = grouped_gemm_fp8(q_RK[one], scale_RB[one], *weights, alone_L, torch.float32, backend)
        assert torch.equal(alone_RN[0], whole_RN[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strip_that_is_not_finite_spoils_its_row_only(backend: str, device: torch.device) -> None:
    args = case([2, 3], 130, 300, device)
    clean = grouped_gemm_fp8(*args, out_dtype=torch.float32, backend=backend)
    args[1][3, 1] = float("nan")
    out_RN = grouped_gemm_fp8(*args, out_dtype=torch.float32, backend=backend)
    assert out_RN[3].isnan().all()
    out_RN[3] = clean[3]
    assert torch.equal(out_RN, clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, device: torch.device) -> None:
    """Strided codes and scales give what contiguous ones do."""
    q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L = case([3, 0, 9], 140, 260, device)
    expected = grouped_gemm_fp8(q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L, torch.float32, backend)
    wide_RK = torch.cat([q_RK.view(torch.uint8)] * 2, 1).view(torch.float8_e4m3fn)[:, :260]
    wide_LNK = torch.cat([wq_LNK.view(torch.uint8)] * 2, 2).view(torch.float8_e4m3fn)[:, :, :260]
    scale_columns_RB = scale_RB.t().contiguous().t()
    wscale_columns_LBB = wscale_LBB.transpose(1, 2).contiguous().transpose(1, 2)
    out_RN = grouped_gemm_fp8(wide_RK, scale_columns_RB, wide_LNK, wscale_columns_LBB, ends_L, torch.float32, backend)
    assert torch.equal(out_RN, expected)


def test_offsets_beyond_int32(device: torch.device) -> None:
    """Strides that fit int32 and offsets that do not, in memory whose pages stay untouched but for a few."""
    q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L = case([1, 1, 1], 5, 40, device)
    far_rows = torch.empty(2**31 + 64, dtype=torch.uint8, device=device).as_strided((3, 40), (2**30, 1))
    far_weights = torch.empty(2**31 + 256, dtype=torch.uint8, device=device)
    far_weights = far_weights.as_strided((3, 5, 40), (2**30, 40, 1))
    far_rows.copy_(q_RK.view(torch.uint8))
    far_weights.copy_(wq_LNK.view(torch.uint8))
    far = far_rows.view(torch.float8_e4m3fn), scale_RB, far_weights.view(torch.float8_e4m3fn), wscale_LBB, ends_L
    out_RN = grouped_gemm_fp8(*far, backend="triton")
    assert torch.equal(out_RN, grouped_gemm_fp8(q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L, backend="triton"))


def test_bad_arguments() -> None:
    good = case([2, 3], 130, 260, torch.device("cpu"))

    def call(index: int, tensor: Tensor, **options: torch.dtype) -> None:
        grouped_gemm_fp8(*good[:index], tensor, *good[index + 1 :], **options)

    q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L = good
    with pytest.raises(ConfigError, match=r"q_RK must be torch.float8_e4m3fn .*, found torch.float32"):
        call(0, q_RK.float())
    with pytest.raises(ConfigError, match=r"q_RK must have 2 dimensions \[R, K\], found shape \(260,\)"):
        call(0, q_RK[0])
    with pytest.raises(ConfigError, match=r"scale_RB must have shape \(5, 3\) .*, found \(5, 2\)"):
        call(1, scale_RB[:, :2])
    with pytest.raises(ConfigError, match=r"scale_RB must be torch.float32 .*, found torch.bfloat16"):
        call(1, scale_RB.bfloat16())
    with pytest.raises(ConfigError, match=r"wq_LNK must be torch.float8_e4m3fn .*, found torch.float8_e5m2"):
        call(2, wq_LNK.view(torch.uint8).view(torch.float8_e5m2))
    with pytest.raises(ConfigError, match=r"q_RK has inner size K=260, but wq_LNK has K=200"):
        call(2, wq_LNK[:, :, :200])
    with pytest.raises(ConfigError, match=r"wscale_LBB must have shape \(2, 2, 3\) .*, found \(2, 1, 3\)"):
        call(3, wscale_LBB[:, :1])
    with pytest.raises(ConfigError, match=r"wscale_LBB is on meta, but wq_LNK is on cpu"):
        call(3, wscale_LBB.to("meta"))
    with pytest.raises(ConfigError, match=r"ends_L must end at the number of rows, 5, found 4"):
        call(4, torch.tensor([2, 4], dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"out_dtype must be one of .*, found torch.float64"):
        call(4, ends_L, out_dtype=torch.float64)
