"""Rows of a float32 product on a CPU keep their bits in any company, at any thread count; so do those of a group.

Half precision on a CPU that has none goes by float32.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crossdock.linear as linear_module
from crossdock.gemm import grouped_gemm
from crossdock.linear import linear

SIZES = [(33, 6), (7, 2), (9, 11), (40, 64), (64, 97), (256, 352), (1024, 40)]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_a_row_is_a_function_of_itself(k: int, n: int, bias: bool) -> None:
    x_MK, w_NK, bias_N = torch.randn(72, k), torch.randn(n, k), torch.randn(n) if bias else None
    torch.set_num_threads(1)
    whole_MN = linear(x_MK, w_NK, bias_N)
    torch.testing.assert_close(whole_MN, F.linear(x_MK, w_NK, bias_N))
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in (*range(1, 18), 63):
            assert torch.equal(linear(x_MK[:rows], w_NK, bias_N), whole_MN[:rows]), (count, rows)
            assert torch.equal(linear(x_MK[-rows:], w_NK, bias_N), whole_MN[-rows:]), (count, rows)


@pytest.mark.parametrize(("k", "n"), SIZES)
def test_a_group_of_any_size_gives_a_row_the_same_bits(k: int, n: int) -> None:
    rows_RK, weights_LNK = torch.randn(72, k), torch.randn(1, n, k)
    whole_RN = linear(rows_RK, weights_LNK[0])
    for size in (*range(1, 10), 17):
        found_RN = grouped_gemm(rows_RK[:size], weights_LNK, torch.tensor([size], dtype=torch.int32))
        assert torch.equal(found_RN, whole_RN[:size]), size


def test_other_dtypes_and_no_rows_pass_through() -> None:
    assert linear(torch.empty(0, 6), torch.randn(3, 6)).shape == (0, 3)
    x_MK, w_NK = torch.randn(3, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    assert torch.equal(linear(x_MK, w_NK), F.linear(x_MK, w_NK))


def test_it_is_differentiable() -> None:
    x_MK, w_NK, bias_N = (torch.randn(s, requires_grad=True) for s in ((5, 7), (3, 7), (3,)))
    linear(x_MK, w_NK, bias_N).square().sum().backward()
    expected = [t.grad for t in (x_MK, w_NK, bias_N)]
    for tensor in (x_MK, w_NK, bias_N):
        tensor.grad = None
    F.linear(x_MK, w_NK, bias_N).square().sum().backward()
    for tensor, grad in zip((x_MK, w_NK, bias_N), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a step of their last bit, relative


@pytest.fixture
def no_halves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A CPU without half precision; gives the rows of each product that went by float32."""
    taken: list[int] = []
    by_float32 = linear_module._by_float32

    def counted(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        taken.append(len(x_MK))
        return by_float32(x_MK, w_NK, bias_N)

    monkeypatch.setattr(linear_module, "_by_float32", counted)
    monkeypatch.setattr(linear_module, "_lacks", HALVES.__contains__)
    return taken


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_by_float32(
    dtype: torch.dtype, bias: bool, no_halves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of 130 rows in three parts; a row's bits are its own, whatever stands beside it."""
    monkeypatch.setattr(linear_module, "CONVERTED", 64 * 70)
    x_MK, w_NK, bias_N = torch.randn(37, 70).to(dtype), torch.randn(130, 70).to(dtype), torch.randn(130).to(dtype)
    whole_MN = linear(x_MK, w_NK, bias_N if bias else None)
    exact_MN = x_MK.double() @ w_NK.double().t() + (bias_N.double() if bias else 0.0)
    assert whole_MN.dtype == dtype
    torch.testing.assert_close(whole_MN.double(), exact_MN, rtol=1.01 * HALVES[dtype], atol=1e-5)
    for rows in range(1, 18):
        assert torch.equal(linear(x_MK[:rows], w_NK, bias_N if bias else None), whole_MN[:rows]), rows
    assert no_halves == [37, *range(1, 18)]
    assert linear(x_MK[:0], w_NK).shape == (0, 130) and not linear(x_MK[:, :0], w_NK[:, :0]).any()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_by_float32_is_differentiable(dtype: torch.dtype, no_halves: list[int]) -> None:
    x_MK, w_NK, bias_N = (torch.randn(s).to(dtype).requires_grad_() for s in ((9, 70), (130, 70), (130,)))
    leaves = x_MK, w_NK, bias_N
    dout_MN = torch.randn(9, 130).to(dtype)
    found = torch.autograd.grad(linear(*leaves), leaves, dout_MN)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(F.linear(*wide), wide, dout_MN.double())
    assert set(no_halves) == {9}
    for grad, exact in zip(found, expected, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), exact, rtol=1.01 * HALVES[dtype], atol=1e-5)
