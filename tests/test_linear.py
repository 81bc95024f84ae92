"""Rows of a float32 product on a CPU keep their bits in any company, at any thread count; so do those of a group."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

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
