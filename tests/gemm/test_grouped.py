"""The grouped product in every dtype and on both backends against float64; who it may depend on; its gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crossdock.gemm.grouped_torch as grouped_torch
import crossdock.linear as linear_module
from crossdock.errors import ConfigError
from crossdock.gemm import grouped, grouped_gemm
from crossdock.gemm.grouped_kernel import grouped_gemm_ref
from crossdock.linear import linear
from tests.gemm.cases import ROUNDING, assert_close_to_float64
from tests.gemm.cases import float_case as case

BACKENDS = ["torch", "triton"]
WITHOUT_HALVES = "torch on a CPU without half precision"
CASES = [  # rows of each group, N, K
    ([1], 1, 1),
    ([0, 0, 5], 64, 128),
    ([3, 0, 70, 1, 0], 130, 200),
    ([129, 0, 64, 2], 33, 65),
    ([0, 0], 16, 16),
    ([700, 3], 70, 16),
    ([1] * 9, 48, 32),
]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU that has half precision, but for one."""
    lacks = {torch.bfloat16, torch.float16} if request.param == WITHOUT_HALVES else set[torch.dtype]()
    monkeypatch.setattr(linear_module, "_lacks", lacks.__contains__)
    return "torch" if request.param == WITHOUT_HALVES else str(request.param)


@pytest.mark.parametrize("backend", [*BACKENDS, WITHOUT_HALVES], indirect=True)
@pytest.mark.parametrize(("counts", "columns", "inner"), CASES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.usefixtures("poison")
def test_against_float64(
    backend: str, counts: list[int], columns: int, inner: int, dtype: torch.dtype, device: torch.device
) -> None:
    args = case(counts, columns, inner, dtype, device)
    out_RN = grouped_gemm(*args, backend=backend)
    assert out_RN.dtype == dtype and out_RN.shape == (sum(counts), columns)
    assert_close_to_float64(out_RN, *args)
    assert_close_to_float64(grouped_gemm_ref(*args), *args)
    assert torch.equal(out_RN, grouped_gemm(*args, backend=backend))


def test_a_cpu_without_half_precision_goes_by_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have the bits that `linear` gives them, in groups of any size."""
    taken: list[int] = []
    by_float32 = grouped_torch._by_float32

    def counted(rows_RA: torch.Tensor, *others: Any) -> torch.Tensor:
        taken.append(len(rows_RA))
        return by_float32(rows_RA, *others)

    monkeypatch.setattr(grouped_torch, "_by_float32", counted)
    monkeypatch.setattr(linear_module, "_lacks", {torch.bfloat16}.__contains__)
    for counts in ([70, 0, 3], [1, 2], [1] * 20, [0, 0]):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            rows_RK, weights_LNK, ends_L = case(counts, 40, 30, dtype, torch.device("cpu"))
            found_RN = grouped_gemm(rows_RK, weights_LNK, ends_L, backend="torch")
            if dtype != torch.float16:
                parts = zip(torch.split(rows_RK, counts), weights_LNK, strict=True)
                assert torch.equal(found_RN, torch.cat([linear(*part) for part in parts]))
    assert taken == [73, 3, 20, 0]


@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 63, 64, 65]), min_size=1, max_size=11),
    columns=st.integers(1, 140),
    inner=st.integers(1, 70),
)
@settings(max_examples=12, deadline=None)
def test_any_sizes(counts: list[int], columns: int, inner: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        args = case(counts, columns, inner, dtype, device)
        for backend in BACKENDS:
            assert_close_to_float64(grouped_gemm(*args, backend=backend), *args)


@pytest.mark.parametrize("backend", [*BACKENDS, WITHOUT_HALVES], indirect=True)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_layouts(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Transposed, strided and offset operands give what contiguous ones do."""
    rows_RK, weights_LNK, ends_L = case([3, 0, 70, 1], 64, 40, dtype, device)
    expected = grouped_gemm(rows_RK, weights_LNK, ends_L, backend=backend)
    transposed_LNK = weights_LNK.transpose(1, 2).contiguous().transpose(1, 2)
    wide_LNK = torch.cat([weights_LNK, weights_LNK], 2)[:, :, :40]
    every_other_LNK = weights_LNK.repeat_interleave(2, 2)[:, :, ::2]
    shifted_LNK = torch.cat([weights_LNK.flatten()[:1], weights_LNK.flatten()])[1:].view(weights_LNK.shape)
    for view in (transposed_LNK, wide_LNK, every_other_LNK, shifted_LNK):
        out_RN = grouped_gemm(rows_RK, view, ends_L, backend=backend)
        torch.testing.assert_close(out_RN, expected, rtol=ROUNDING[dtype] or 1e-5, atol=1e-3)
    for view in (torch.cat([rows_RK, rows_RK], 1)[:, :40], rows_RK.t().contiguous().t()):
        out_RN = grouped_gemm(view, weights_LNK, ends_L, backend=backend)
        torch.testing.assert_close(out_RN, expected, rtol=ROUNDING[dtype] or 1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_triton_rows_do_not_depend_on_their_company(dtype: torch.dtype, device: torch.device) -> None:
    """A row alone, in its group, and in a batch large enough for the other tile height has the same bits."""
    rows_RK, weights_LNK, ends_L = case([200, 0, 71], 96, 150, dtype, device)
    whole_RN = grouped_gemm(rows_RK, weights_LNK, ends_L, backend="triton")
    for row, group in ((0, 0), (63, 0), (64, 0), (199, 0), (200, 2), (270, 2)):
        alone_L = torch.tensor([int(other >= group) for other in range(3)], dtype=torch.int32, device=device)
        alone_RN = grouped_gemm(rows_RK[row : row + 1], weights_LNK, alone_L, backend="triton")
        assert torch.equal(alone_RN[0], whole_RN[row])


@pytest.mark.parametrize(("columns", "inner"), [(1, 7), (64, 64), (130, 300), (256, 1024)])
def test_torch_float32_rows_do_not_depend_on_their_company(columns: int, inner: int) -> None:
    """On a CPU: a row's bits alone equal its bits in a group of any size, wherever in the batch that group is."""
    rows_RK, weights_LNK, _ = case([40, 0], columns, inner, torch.float32, torch.device("cpu"))
    alone_RN = torch.cat(
        [grouped_gemm(row[None], weights_LNK[:1], torch.tensor([1], dtype=torch.int32)) for row in rows_RK]
    )
    for size in [*range(1, 18), 31, 32, 39]:
        ends_L = torch.tensor([size, 40], dtype=torch.int32)
        same_LNK = weights_LNK[:1].expand(2, -1, -1)
        assert torch.equal(grouped_gemm(rows_RK, same_LNK, ends_L, backend="torch"), alone_RN)


def test_offsets_beyond_int32(device: torch.device) -> None:
    """Strides that fit int32 and offsets that do not, in memory whose pages stay untouched but for a few."""
    rows_RK, weights_LNK, ends_L = case([1, 1, 1], 5, 40, torch.bfloat16, device)
    far_rows = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 40), (2**30, 1))
    far_weights = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)
    far_weights = far_weights.as_strided((3, 5, 40), (2**30, 40, 1))
    far_rows.copy_(rows_RK)
    far_weights.copy_(weights_LNK)
    out_RN = grouped_gemm(far_rows, far_weights, ends_L, backend="triton")
    assert torch.equal(out_RN, grouped_gemm(rows_RK, weights_LNK, ends_L, backend="triton"))


def test_gradients_in_float64() -> None:
    rows_RK, weights_LNK, ends_L = case([3, 0, 1, 2], 4, 5, torch.float64, torch.device("cpu"))
    rows_RK.requires_grad_()
    weights_LNK.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, ends_L), (rows_RK, weights_LNK))


@pytest.mark.parametrize("backend", [*BACKENDS, WITHOUT_HALVES], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("counts", "columns", "inner"), [([3, 0, 70, 1], 33, 40), ([0, 0], 8, 8), ([65], 130, 200)])
@pytest.mark.usefixtures("poison")
def test_gradients_against_float64(
    backend: str, dtype: torch.dtype, counts: list[int], columns: int, inner: int, device: torch.device
) -> None:
    rows_RK, weights_LNK, ends_L = case(counts, columns, inner, dtype, device)
    rows_RK.requires_grad_()
    weights_LNK.requires_grad_()
    dout_RN = torch.randn(len(rows_RK), columns, device=device).to(dtype)
    grouped_gemm(rows_RK, weights_LNK, ends_L, backend=backend).backward(dout_RN)
    assert rows_RK.grad is not None and weights_LNK.grad is not None
    with torch.no_grad():
        assert_close_to_float64(rows_RK.grad, dout_RN, weights_LNK.transpose(1, 2), ends_L)
        start = 0
        for dw_NK, end in zip(weights_LNK.grad, ends_L.tolist(), strict=True):
            group_L = torch.tensor([columns], dtype=torch.int32)
            x_1KR = rows_RK[start:end].t()[None]
            assert_close_to_float64(dw_NK, dout_RN[start:end].t(), x_1KR, group_L)
            start = end


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradient_of_what_is_asked_for(backend: str, device: torch.device) -> None:
    """One operand alone may need a gradient, and a broadcast one may come in."""
    rows_RK, weights_LNK, ends_L = case([2, 3], 8, 16, torch.float32, device)
    for leaf in (rows_RK, weights_LNK):
        leaf.requires_grad_()
        grouped_gemm(rows_RK, weights_LNK, ends_L, backend=backend).sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        leaf.requires_grad_(False)
        leaf.grad = None
    assert rows_RK.grad is None


def test_bad_arguments() -> None:
    rows_RK, weights_LNK, ends_L = case([2, 3], 8, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"rows_RK must have 2 dimensions \[R, K\], found shape \(16,\)"):
        grouped_gemm(rows_RK[0], weights_LNK, ends_L)
    with pytest.raises(ConfigError, match=r"weights_LNK must have 3 dimensions \[L, N, K\], found shape \(8, 16\)"):
        grouped_gemm(rows_RK, weights_LNK[0], ends_L)
    with pytest.raises(ConfigError, match=r"rows_RK has inner size K=16, but weights_LNK has K=15"):
        grouped_gemm(rows_RK, weights_LNK[:, :, 1:], ends_L)
    with pytest.raises(ConfigError, match=r"weights_LNK must be torch.float32 .*, found torch.bfloat16"):
        grouped_gemm(rows_RK, weights_LNK.bfloat16(), ends_L)
    with pytest.raises(ConfigError, match=r"rows_RK must be .*, found torch.int32"):
        grouped_gemm(rows_RK.int(), weights_LNK.int(), ends_L)
    with pytest.raises(ConfigError, match=r"rows_RK must be .*, found torch.float64"):
        grouped_gemm(rows_RK.double(), weights_LNK.double(), ends_L, backend="triton")
    with pytest.raises(ConfigError, match=r"ends_L must be torch.int32 .*, found torch.int64"):
        grouped_gemm(rows_RK, weights_LNK, ends_L.long())
    with pytest.raises(ConfigError, match=r"ends_L must have shape \(2,\) .*, found \(1,\)"):
        grouped_gemm(rows_RK, weights_LNK, ends_L[1:])
    with pytest.raises(ConfigError, match=r"ends_L must not decrease: group 1 ends at 5 but starts at 6"):
        grouped_gemm(rows_RK, weights_LNK, torch.tensor([6, 5], dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"ends_L must not decrease: group 0 ends at -1 but starts at 0"):
        grouped_gemm(rows_RK, weights_LNK, torch.tensor([-1, 5], dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"ends_L must end at the number of rows, 5, found 4"):
        grouped_gemm(rows_RK, weights_LNK, torch.tensor([2, 4], dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"weights_LNK is on meta, but rows_RK is on cpu"):
        grouped_gemm(rows_RK, weights_LNK.to("meta"), ends_L)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradients_with_ends_that_are_not_contiguous(backend: str, device: torch.device) -> None:
    rows_RK, weights_LNK, ends_L = case([2, 3, 2], 5, 8, torch.float32, device)
    strided_L = torch.stack((ends_L, ends_L + 9), dim=1)[:, 0]
    weights_LNK.requires_grad_()
    expected, found = (
        torch.autograd.grad(grouped_gemm(rows_RK, weights_LNK, ends, backend=backend).sum(), weights_LNK)[0]
        for ends in (ends_L, strided_L)
    )
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("poison")
def test_no_gradient_reaches_rows_behind_the_last_end(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host does not know how many rows are in use."""
    rows_RK, weights_LNK, _ = case([6], 5, 8, torch.float32, device)
    weights_LNK = weights_LNK.expand(2, 5, 8)
    monkeypatch.setattr(grouped, "_knows_ends", lambda ends_L: False)
    rows_RK.requires_grad_()
    ends_L = torch.tensor([2, 4], dtype=torch.int32, device=device)
    out_RN = grouped_gemm(rows_RK, weights_LNK, ends_L, backend="triton", may_end_early=True)
    out_RN[:4].sum().backward()
    assert not rows_RK.grad.isnan().any() and not rows_RK.grad[4:].any() and rows_RK.grad[:4].all()
