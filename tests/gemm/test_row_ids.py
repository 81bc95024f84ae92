"""Rows gathered in the prologue: the same bits as rows gathered beforehand, and nothing touched behind the last end."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.gemm import (
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_gemm_fp8_rowwise,
    grouped_swiglu,
    grouped_swiglu_fp8,
    quantize_whole_rows,
)
from crossdock.gemm.grouped_kernel import grouped_gemm_ref
from crossdock.gemm.tile_map import gather_rows
from tests.gemm.cases import assert_close_to_float64, float_case, fp8_case

BACKENDS = ["torch", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # numpy, interpreting
ORDERS = [  # rows of each group, how many ids stand behind the last
    ([3, 0, 70, 1, 0], 0),
    ([2, 3], 4),
    ([0, 0], 5),
    ([1], 130),
]
FEW = [7, 2]  # rows of the two groups that the float and FP8 cases are made for


def order(counts: list[int], behind: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ends_L and row_ids_R, which name rows many times; ids behind the last end are out of any range."""
    ids_R = torch.randint(0, rows, (sum(counts),), generator=torch.Generator().manual_seed(sum(counts)))
    ids_R = torch.cat([ids_R, torch.full((behind,), -(2**20))])
    return torch.tensor(counts).cumsum(0).to(device, torch.int32), ids_R.to(device)


def as_bytes(out: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    tensors = [out] if isinstance(out, Tensor) else list(out)
    return [tensor.view(torch.uint8) if tensor.numel() else tensor for tensor in tensors]


def check(
    call: Callable[..., Tensor | tuple[Tensor, Tensor]], tensors: list[Tensor], counts: list[int], behind: int
) -> None:
    """`call(tensors, ends, row_ids)` against itself with the tensors' rows gathered before."""
    ends_L, ids_R = order(counts, behind, tensors[0].shape[0], tensors[0].device)
    used = sum(counts)
    gathered = [tensor[ids_R[:used]] for tensor in tensors]
    expected = as_bytes(call(gathered, ends_L, None))
    for ids in (ids_R, ids_R.to(torch.int32), torch.stack([ids_R, ids_R], 1)[:, 0]):
        for seen, want in zip(as_bytes(call(tensors, ends_L, ids)), expected, strict=True):
            assert len(seen) == used + behind
            assert used == 0 or torch.equal(seen[:used], want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("counts", "behind"), ORDERS)
@pytest.mark.usefixtures("poison")
def test_float(backend: str, dtype: torch.dtype, counts: list[int], behind: int, device: torch.device) -> None:
    rows_TK, _, _ = float_case(FEW, 1, 70, dtype, device)
    _, weights_LNK, _ = float_case(counts, 34, 70, dtype, device)
    check(
        lambda rows, ends_L, ids: grouped_gemm(*rows, weights_LNK, ends_L, backend=backend, row_ids_R=ids),
        [rows_TK],
        counts,
        behind,
    )
    check(
        lambda rows, ends_L, ids: grouped_swiglu(*rows, weights_LNK, ends_L, ids, backend=backend),
        [rows_TK],
        counts,
        behind,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counts", "behind"), ORDERS)
@pytest.mark.usefixtures("poison")
def test_fp8(backend: str, counts: list[int], behind: int, device: torch.device) -> None:
    q_TK, scale_TB, *_ = fp8_case(FEW, 1, 150, device)
    _, _, *weights, _ = fp8_case(counts, 256, 150, device)
    by_row = quantize_whole_rows(torch.randn(len(counts), 40, 150, device=device))
    check(
        lambda rows, ends_L, ids: grouped_gemm_fp8(*rows, *weights, ends_L, backend=backend, row_ids_R=ids),
        [q_TK, scale_TB],
        counts,
        behind,
    )
    check(
        lambda rows, ends_L, ids: grouped_gemm_fp8_rowwise(*rows, *by_row, ends_L, backend=backend, row_ids_R=ids),
        [q_TK, scale_TB[:, 0].contiguous()],
        counts,
        behind,
    )
    check(
        lambda rows, ends_L, ids: grouped_swiglu_fp8(*rows, *weights, ends_L, ids, backend=backend),
        [q_TK, scale_TB],
        counts,
        behind,
    )


@pytest.mark.usefixtures("poison")
def test_nothing_is_written_behind_the_last_end(device: torch.device) -> None:
    ends_L, ids_R = order([2, 3], 40, 9, device)
    rows_TK, weights_LNK, _ = float_case(FEW, 34, 70, torch.bfloat16, device)
    q_TK, scale_TB, *weights, _ = fp8_case(FEW, 256, 150, device)
    options = {"backend": "triton", "row_ids_R": ids_R}
    for out in (
        grouped_gemm(rows_TK, weights_LNK, ends_L, **options),
        grouped_swiglu(rows_TK, weights_LNK, ends_L, **options),
        grouped_gemm_fp8(q_TK, scale_TB, *weights, ends_L, **options),
        grouped_swiglu_fp8(q_TK, scale_TB, *weights, ends_L, **options),
    ):
        for seen in as_bytes(out):
            assert (seen[:5] != 0xFF).any(1).all() and (seen[5:] == 0xFF).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poison")
def test_ends_before_the_last_row_without_ids(backend: str, device: torch.device) -> None:
    """The second product of an expert takes what the first one left: rows behind the last end are not read."""
    ends_L = torch.tensor([2, 2, 5], dtype=torch.int32, device=device)
    rows_RK, weights_LNK, _ = float_case([2, 0, 6], 16, 64, torch.bfloat16, device)
    q_RK, scale_RB, *weights, _ = fp8_case([2, 0, 6], 40, 150, device)
    rows_RK[5:], scale_RB[5:] = float("nan"), float("nan")
    options = {"backend": backend, "may_end_early": True}
    for leaf in (rows_RK, rows_RK.clone().requires_grad_()):
        out_RN = grouped_gemm(leaf, weights_LNK, ends_L, **options)
        expected_RN = grouped_gemm(rows_RK[:5], weights_LNK, ends_L, backend=backend)
        assert out_RN.shape == (8, 16) and torch.equal(out_RN[:5], expected_RN)
    (drows_RK,) = torch.autograd.grad(out_RN, leaf, torch.ones_like(out_RN))
    assert drows_RK[:5].isfinite().all()
    out_RN = grouped_gemm_fp8(q_RK, scale_RB, *weights, ends_L, **options)
    expected_RN = grouped_gemm_fp8(q_RK[:5], scale_RB[:5], *weights, ends_L, backend=backend)
    assert out_RN.shape == (8, 40) and torch.equal(out_RN[:5], expected_RN)
    by_row = scale_RB[:, 0], weights[0], weights[1][:, :1, 0].repeat(1, 40), ends_L
    assert not grouped_gemm_fp8_rowwise(q_RK, *by_row, **options)[:5].isnan().any()
    with pytest.raises(ConfigError, match=r"ends_L must not end beyond the number of rows, 4, found 5"):
        grouped_gemm(rows_RK[:4], weights_LNK, ends_L, may_end_early=True, checked=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_memory(backend: str, device: torch.device) -> None:
    """No row in memory, and so none in use, whatever the ids are."""
    rows_TK, weights_LNK, _ = float_case([0, 0], 8, 16, torch.float32, device)
    ends_L, ids_R = order([0, 0], 3, 1, device)
    rows_TK.requires_grad_()
    out_RN = grouped_gemm(rows_TK, weights_LNK, ends_L, backend=backend, row_ids_R=ids_R)
    out_RN.sum().backward()
    assert out_RN.shape == (3, 8) and rows_TK.grad is not None and rows_TK.grad.shape == (0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("behind", [0, 30])
@pytest.mark.usefixtures("poison")
def test_gradients(backend: str, behind: int, device: torch.device) -> None:
    """A row named twice gets the sum of two gradients; what stands behind the last end goes nowhere."""
    counts = [30, 0, 4]
    rows_TK, weights_LNK, _ = float_case(FEW, 1, 40, torch.float32, device)
    _, weights_LNK, _ = float_case(counts, 24, 40, torch.float32, device)
    ends_L, ids_R = order(counts, behind, 9, device)
    rows_TK.requires_grad_()
    weights_LNK.requires_grad_()
    out_RN = grouped_gemm(rows_TK, weights_LNK, ends_L, backend=backend, row_ids_R=ids_R)
    dout_RN = torch.randn(34 + behind, 24, device=device)
    dout_RN[34:] = float("nan")
    out_RN.backward(dout_RN)
    leaves = rows_TK.detach().double().requires_grad_(), weights_LNK.detach().double().requires_grad_()
    groups = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)).to(device)
    expected = torch.einsum("rk,rnk->rn", leaves[0][ids_R[:34]], leaves[1][groups])
    expected.backward(dout_RN[:34].double())
    for seen, want in zip((rows_TK, weights_LNK), leaves, strict=True):
        assert seen.grad is not None and want.grad is not None
        torch.testing.assert_close(seen.grad.double(), want.grad, rtol=1e-4, atol=1e-3)


def test_few_rows_of_bfloat16_with_ids_behind_the_last_end(device: torch.device) -> None:
    """Rows in use are few and aligned, which the torch backend multiplies in another way."""
    rows_TK, weights_LNK, _ = float_case(FEW, 16, 64, torch.bfloat16, device)
    ends_L, ids_R = order([2, 3], 8, 9, device)
    out_RN = grouped_gemm(rows_TK, weights_LNK, ends_L, backend="torch", row_ids_R=ids_R)
    assert_close_to_float64(out_RN[:5], rows_TK[ids_R[:5]], weights_LNK, ends_L)


@pytest.mark.parametrize("behind", [0, 6])
def test_gather_that_does_not_read_the_ends(behind: int, device: torch.device) -> None:
    """What a GPU does before a product with a gradient: the same rows and gradients, NaN behind going nowhere."""
    rows_TK = torch.randn(9, 5, device=device, requires_grad=True)
    ends_L, ids_R = order([4, 0, 3], behind, 9, device)
    gathered_RK = gather_rows(rows_TK, ids_R, ends_L)
    assert torch.equal(gathered_RK[:7], rows_TK[ids_R[:7]]) and gathered_RK.shape == (7 + behind, 5)
    dout_RK = torch.randn(7 + behind, 5, device=device)
    dout_RK[7:] = float("nan")
    (drows_TK,) = torch.autograd.grad(gathered_RK, rows_TK, dout_RK)
    (expected_TK,) = torch.autograd.grad(rows_TK[ids_R[:7]], rows_TK, dout_RK[:7])
    torch.testing.assert_close(drows_TK, expected_TK)
    assert gather_rows(rows_TK[:0], ids_R, torch.zeros_like(ends_L)).shape == (7 + behind, 5)


def test_reference(device: torch.device) -> None:
    rows_TK, weights_LNK, _ = float_case(FEW, 20, 30, torch.float32, device)
    ends_L, ids_R = order([4, 6], 0, 9, device)
    out_RN = grouped_gemm_ref(rows_TK, weights_LNK, ends_L, ids_R)
    assert_close_to_float64(out_RN, rows_TK[ids_R], weights_LNK, ends_L)


def test_offsets_beyond_int32(device: torch.device) -> None:
    """10^5 rows whose offsets pass 2^31, in memory whose pages stay untouched but for a few."""
    rows, stride = 100_003, 21_600
    ids_R = torch.tensor([0, 50_000, 99_999, 100_002], device=device)
    for dtype in (torch.bfloat16, torch.uint8):
        far = torch.empty(rows * stride, dtype=dtype, device=device).as_strided((rows, 40), (stride, 1))
        ends_L = torch.tensor([1, 4], dtype=torch.int32, device=device)
        if dtype == torch.bfloat16:
            near_RK, weights_LNK, _ = float_case([2, 2], 6, 40, dtype, device)
            far[ids_R] = near_RK
            for product in (grouped_gemm, grouped_swiglu):
                out = product(far, weights_LNK, ends_L, backend="triton", row_ids_R=ids_R)
                assert torch.equal(out, product(near_RK, weights_LNK, ends_L, backend="triton"))
        else:
            q_RK, scale_RB, *weights, _ = fp8_case([2, 2], 256, 40, device)
            far[ids_R] = q_RK.view(torch.uint8)
            scale_TB = torch.zeros(rows, 1, device=device)
            scale_TB[ids_R] = scale_RB
            args = far.view(torch.float8_e4m3fn), scale_TB, *weights, ends_L
            for fp8_product in (grouped_gemm_fp8, grouped_swiglu_fp8):
                seen = as_bytes(fp8_product(*args, backend="triton", row_ids_R=ids_R))
                want = as_bytes(fp8_product(q_RK, scale_RB, *weights, ends_L, backend="triton"))
                assert all(map(torch.equal, seen, want))
