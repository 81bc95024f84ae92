"""An expert's first half in one launch: equal to its parts to the bit, and close to float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.gemm import (
    dequantize_blocks,
    dequantize_rows,
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_swiglu,
    grouped_swiglu_fp8,
    quantize_blocks,
    quantize_rows,
    swiglu,
    swiglu_quantize,
)
from crossdock.gemm.grouped_fp8_swiglu_kernel import grouped_swiglu_fp8_ref
from crossdock.gemm.grouped_swiglu_kernel import grouped_swiglu_ref
from tests.gemm.cases import exact_case, exact_fp8_case, float_case

BACKENDS = ["torch", "triton"]
ROUGHLY = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # interpreted bf16 truncates, the reference rounds
CASES = [  # rows of each group, F, D
    ([1], 1, 1),
    ([3, 0, 70, 1, 0], 65, 130),
    ([0, 0], 16, 16),
    ([130, 3], 70, 64),  # more than 64 rows a group: the product alone then takes another tile
    ([1] * 9, 24, 32),
]
FP8_CASES = [([1], 128, 1), ([3, 0, 70, 1, 0], 128, 300), ([0, 0], 128, 128), ([130, 1], 128, 129), ([2], 256, 40)]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, in the interpreter


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    """Codes and scales equal to the bit, NaN to NaN."""
    return torch.equal(first[0].view(torch.uint8), second[0].view(torch.uint8)) and torch.equal(
        first[1].view(torch.int32), second[1].view(torch.int32)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counts", "inner", "hidden"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poison")
def test_equals_its_parts(
    backend: str, counts: list[int], inner: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows_RD, weights, ends_L = exact_case(counts, 2 * inner, hidden, dtype, device)
    out_RF = grouped_swiglu(rows_RD, weights, ends_L, backend=backend)
    parts_RF = swiglu(grouped_gemm(rows_RD, weights, ends_L, backend=backend), backend=backend)
    assert out_RF.dtype == dtype and out_RF.shape == (sum(counts), inner)
    assert torch.equal(out_RF, parts_RF)
    assert torch.equal(out_RF, grouped_swiglu(rows_RD, weights, ends_L, backend=backend))
    expected_RF = grouped_swiglu_ref(rows_RD, weights, ends_L).float()
    assert (out_RF.float() - expected_RF).norm() <= ROUGHLY[dtype] * expected_RF.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poison")
def test_against_float64(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Sizes span decades, up to where exp(-gate) is infinite; gate and up are rounded between."""
    rows_RD, weights, ends_L = float_case([5, 0, 66], 2 * 40, 50, dtype, device)
    out_RF = grouped_swiglu(rows_RD, weights, ends_L, backend=backend).double()
    group_R = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 0, 66])).to(device)
    both_R2F = torch.einsum("rd,rfd->rf", rows_RD.double(), weights.double()[group_R])
    size_R2F = torch.einsum("rd,rfd->rf", rows_RD.double().abs(), weights.double().abs()[group_R])
    gate_RF, up_RF = both_R2F.chunk(2, 1)
    expected_RF = F.silu(gate_RF) * up_RF
    step = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6}[dtype]
    gate_size_RF, up_size_RF = (size_R2F * step).chunk(2, 1)
    bound_RF = 1.1 * gate_size_RF * up_RF.abs() + F.silu(gate_RF).abs() * up_size_RF + gate_size_RF * up_size_RF
    assert ((out_RF - expected_RF).abs() <= bound_RF + expected_RF.abs() * step + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counts", "inner", "hidden"), FP8_CASES)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.usefixtures("poison")
def test_fp8_equals_its_parts(
    backend: str, counts: list[int], inner: int, hidden: int, pow2: bool, device: torch.device
) -> None:
    args = exact_fp8_case(counts, 2 * inner, hidden, device)
    for out_dtype in (torch.bfloat16,) if pow2 else (torch.bfloat16, torch.float32):
        pair = grouped_swiglu_fp8(*args, pow2=pow2, out_dtype=out_dtype, backend=backend)
        both_R2F = grouped_gemm_fp8(*args, out_dtype=out_dtype, backend=backend)
        assert pair[0].shape == (sum(counts), inner) and pair[1].shape == (sum(counts), inner // 128)
        assert same(pair, swiglu_quantize(both_R2F, pow2=pow2, backend=backend))
        assert same(pair, grouped_swiglu_fp8(*args, pow2=pow2, out_dtype=out_dtype, backend=backend))
        back_RF, expected_RF = (
            dequantize_rows(*each) for each in (pair, grouped_swiglu_fp8_ref(*args, pow2, out_dtype))
        )
        assert (back_RF - expected_RF).norm() <= 0.03 * expected_RF.norm()  # a code may fall the other way


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_against_float64(backend: str, device: torch.device) -> None:
    """Rows and weights span decades; what comes out is within e4m3's half step of its strip."""
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(9, 260, generator=generator) * 10 ** torch.linspace(-2, 1, 9)[:, None]
    weights = torch.randn(2, 512, 260, generator=generator) / 16
    q_RD, scale_RB = (tensor.to(device) for tensor in quantize_rows(rows_RD))
    wq, wscale = (tensor.to(device) for tensor in quantize_blocks(weights))
    ends_L = torch.tensor([4, 9], dtype=torch.int32, device=device)
    codes = q_RD, scale_RB, wq, wscale, ends_L
    back_RF = dequantize_rows(*grouped_swiglu_fp8(*codes, out_dtype=torch.float32, backend=backend)).double()
    x_RD, w = dequantize_rows(q_RD, scale_RB).double(), dequantize_blocks(wq, wscale).double()
    gate_RF, up_RF = torch.cat([x_RD[:4] @ w[0].t(), x_RD[4:] @ w[1].t()]).chunk(2, 1)
    expected_RF = F.silu(gate_RF) * up_RF
    strip_RF = torch.cat([half.abs().amax(1, keepdim=True).expand_as(half) for half in expected_RF.chunk(2, 1)], 1)
    assert ((back_RF - expected_RF).abs() <= expected_RF.abs() * 2.0**-3.9 + strip_RF * 2.0**-17).all()


def test_fp8_whose_halves_share_a_block(device: torch.device) -> None:
    """F = 200: a block of weights spans gate and up, and the last strip is short."""
    args = exact_fp8_case([3, 0, 5], 400, 140, device)
    for backend in BACKENDS:
        pair = grouped_swiglu_fp8(*args, backend=backend)
        assert same(pair, swiglu_quantize(grouped_gemm_fp8(*args, backend=backend), backend=backend))


def test_a_nan_spoils_its_row_only(device: torch.device) -> None:
    args = exact_fp8_case([2, 3], 256, 300, device)
    clean = dequantize_rows(*grouped_swiglu_fp8(*args, backend="triton"))
    args[1][3, 1] = float("nan")
    back = dequantize_rows(*grouped_swiglu_fp8(*args, backend="triton"))
    assert back[3].isnan().all()
    back[3] = clean[3]
    assert torch.equal(back, clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_what_computes_them_are_those_of_the_parts(backend: str, device: torch.device) -> None:
    rows_RD, weights, ends_L = exact_case([3, 0, 70, 1], 2 * 33, 40, torch.float32, device)
    ids_R = torch.arange(74, device=device).flip(0)
    plain_RF = grouped_swiglu(rows_RD, weights, ends_L, ids_R, backend=backend)
    leaves = [rows_RD.requires_grad_(), weights.requires_grad_()]
    out_RF = grouped_swiglu(rows_RD, weights, ends_L, ids_R, backend=backend)
    assert torch.equal(out_RF, plain_RF)
    parts_RF = swiglu(grouped_gemm(rows_RD[ids_R], weights, ends_L, backend=backend), backend=backend)
    assert torch.equal(out_RF, parts_RF)
    dout_RF = torch.randn(74, 33, device=device)
    for seen, want in zip(
        torch.autograd.grad(out_RF, leaves, dout_RF), torch.autograd.grad(parts_RF, leaves, dout_RF), strict=True
    ):
        assert torch.equal(seen, want)


def test_layouts(device: torch.device) -> None:
    """Strided rows and weights, and weights with unit stride along 2F, which the two launches take."""
    rows_RD, weights, ends_L = exact_case([3, 0, 9], 2 * 24, 40, torch.bfloat16, device)
    expected_RF = grouped_swiglu(rows_RD, weights, ends_L, backend="triton")
    wide = torch.cat([weights, weights], 2)[:, :, :40]
    for view in (wide, weights.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(grouped_swiglu(rows_RD, view, ends_L, backend="triton"), expected_RF)
    for rows in (torch.cat([rows_RD, rows_RD], 1)[:, :40], rows_RD.t().contiguous().t()):
        assert torch.equal(grouped_swiglu(rows, weights, ends_L, backend="triton"), expected_RF)
    q_RD, scale_RB, wq, wscale, ends_L = exact_fp8_case([3, 0, 9], 256, 140, device)
    pair = grouped_swiglu_fp8(q_RD, scale_RB, wq, wscale, ends_L, backend="triton")
    columns = torch.empty_strided(wq.shape, (256 * 140, 1, 256), dtype=torch.uint8, device=device)
    columns = columns.copy_(wq.view(torch.uint8)).view(torch.float8_e4m3fn)
    scale_columns_RB = scale_RB.t().contiguous().t()
    assert same(grouped_swiglu_fp8(q_RD, scale_columns_RB, columns, wscale, ends_L, backend="triton"), pair)


def test_bad_arguments() -> None:
    cpu = torch.device("cpu")
    rows_RD, weights, ends_L = float_case([2, 3], 8, 16, torch.float32, cpu)
    with pytest.raises(ConfigError, match=r"gate_up_L2FD must have an even number of rows, gate and up, found 7"):
        grouped_swiglu(rows_RD, weights[:, :7], ends_L)
    with pytest.raises(ConfigError, match=r"rows_RD has inner size K=16, but gate_up_L2FD has K=15"):
        grouped_swiglu(rows_RD, weights[:, :, 1:], ends_L)
    with pytest.raises(ConfigError, match=r"gate_up_L2FD must be torch.float32 .*, found torch.bfloat16"):
        grouped_swiglu(rows_RD, weights.bfloat16(), ends_L)
    codes = exact_fp8_case([2, 3], 256, 130, cpu)
    with pytest.raises(ConfigError, match=r"wq_L2FD must have an even number of rows, gate and up, found 255"):
        grouped_swiglu_fp8(codes[0], codes[1], codes[2][:, :255], *codes[3:])
    with pytest.raises(ConfigError, match=r"wscale_LBB must have shape \(2, 2, 2\) .*, found \(2, 1, 2\)"):
        grouped_swiglu_fp8(*codes[:3], codes[3][:, :1], codes[4])
    with pytest.raises(ConfigError, match=r"out_dtype must be one of .*, found torch.float64"):
        grouped_swiglu_fp8(*codes, out_dtype=torch.float64)
