"""Inputs of grouped products, and how close to float64 an output must be.

Two kinds of inputs. In `float_case` and `fp8_case` sizes or scales span decades, so that a misplaced one shows. In the
`exact_` ones every sum over a step along K is exact and the sum of the steps is not: an output's bits then depend on
the order of the steps alone, and not on how the interpreter's BLAS multiplies blocks of one shape or another.
"""

import torch
from torch import Tensor

from crossdock.gemm import dequantize_blocks, dequantize_rows, dequantize_whole_rows, quantize_blocks, quantize_rows

ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # interpreted bf16 truncates
STEP = {torch.bfloat16: 64, torch.float32: 16, torch.float8_e4m3fn: 128}  # along K


def ends_of(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(device, torch.int32)


def float_case(
    counts: list[int], columns: int, inner: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and ends; sizes span decades from one row and one output column to the next."""
    generator = torch.Generator().manual_seed(sum(counts) * 10007 + columns * 101 + inner)
    rows, groups = sum(counts), len(counts)
    rows_RK = torch.randn(rows, inner, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)
    weights_LNK = torch.randn(groups, columns, inner, generator=generator)
    weights_LNK *= 10 ** torch.randn(groups, columns, 1, generator=generator)
    if dtype == torch.float16:  # its sums must stay below 65504
        rows_RK, weights_LNK = rows_RK.clamp(-15, 15), weights_LNK.clamp(-15, 15)
    return rows_RK.to(device, dtype), weights_LNK.to(device, dtype), ends_of(counts, device)


def fp8_case(counts: list[int], columns: int, inner: int, device: torch.device) -> list[Tensor]:
    """q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L, with every scale 10^-3 ... 10^3: a misplaced one shows."""
    generator = torch.Generator().manual_seed(sum(counts) * 10007 + columns * 101 + inner)
    rows, groups = sum(counts), len(counts)
    q_RK, scale_RB = quantize_rows(torch.randn(rows, inner, generator=generator))
    wq_LNK, wscale_LBB = quantize_blocks(torch.randn(groups, columns, inner, generator=generator))
    scale_RB *= 10 ** (6 * torch.rand(scale_RB.shape, generator=generator) - 3)
    wscale_LBB *= 10 ** (6 * torch.rand(wscale_LBB.shape, generator=generator) - 3)
    return [tensor.to(device) for tensor in (q_RK, scale_RB, wq_LNK, wscale_LBB, ends_of(counts, device))]


def exact_case(
    counts: list[int], columns: int, inner: int, dtype: torch.dtype, device: torch.device, cancel: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and ends: small integers, times another power of two for each row, column and step along K.

    `cancel`: the first step is large and the last takes it away again, so that even an output of few bits shows in
    what order the others were added in between. K must then be whole steps.
    """
    generator = torch.Generator().manual_seed(sum(counts) * 10007 + columns * 101 + inner)
    rows_RK = _integers((sum(counts), inner), generator) * _powers((sum(counts), inner), STEP[dtype], generator)
    shape = (len(counts), columns, inner)
    weights_LNK = _integers(shape, generator) * _powers(shape, STEP[dtype], generator)
    if cancel:
        step = STEP[dtype]
        rows_RK[:, :step] *= 2.0**14
        rows_RK[:, -step:] = -rows_RK[:, :step]
        weights_LNK[:, :, -step:] = weights_LNK[:, :, :step]
    return rows_RK.to(device, dtype), weights_LNK.to(device, dtype), ends_of(counts, device)


def exact_fp8_case(counts: list[int], columns: int, inner: int, device: torch.device) -> list[Tensor]:
    """q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L: codes of small integers, scales of a full mantissa."""
    generator = torch.Generator().manual_seed(sum(counts) * 10007 + columns * 101 + inner)
    rows, groups, blocks = sum(counts), len(counts), -(-inner // 128)
    q_RK = _integers((rows, inner), generator).to(torch.float8_e4m3fn)
    wq_LNK = _integers((groups, columns, inner), generator).to(torch.float8_e4m3fn)
    scale_RB = torch.rand(rows, blocks, generator=generator) / 64 + 1e-3
    wscale_LBB = torch.rand(groups, -(-columns // 128), blocks, generator=generator) / 64 + 1e-3
    return [tensor.to(device) for tensor in (q_RK, scale_RB, wq_LNK, wscale_LBB, ends_of(counts, device))]


def _integers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-8, 9, shape, generator=generator).float()


def _powers(shape: tuple[int, ...], step: int, generator: torch.Generator) -> Tensor:
    exponents = torch.randint(-9, 2, (*shape[:-1], -(-shape[-1] // step)), generator=generator)
    return (2.0**exponents).repeat_interleave(step, -1)[..., : shape[-1]]


def assert_close_to_float64(
    out_RN: Tensor, rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor, error: float = 2.0**-20
) -> None:
    """Each element within float32 summation error of its own terms, and one rounding to its dtype."""
    start = 0
    for w_NK, end in zip(weights_LNK.double(), ends_L.tolist(), strict=True):
        x_RK, seen = rows_RK[start:end].double(), out_RN[start:end].double()
        expected, size = x_RK @ w_NK.t(), x_RK.abs() @ w_NK.abs().t()
        bound = size * error + expected.abs() * ROUNDING[out_RN.dtype] + 1e-6 * (out_RN.dtype == torch.float16)
        assert ((seen - expected).abs() <= bound).all()  # NaN fails it too
        start = end


def assert_fp8_close_to_float64(out_RN: Tensor, args: list[Tensor]) -> None:
    """The same for codes and scales, per block or per row; a device's own sums of FP8 products are held to 2^-12."""
    q_RK, scale, wq_LNK, wscale, ends_L = args
    by_row = wscale.dim() == 2
    rows_RK = (dequantize_whole_rows if by_row else dequantize_rows)(q_RK, scale)
    weights_LNK = (dequantize_whole_rows if by_row else dequantize_blocks)(wq_LNK, wscale)
    assert_close_to_float64(out_RN, rows_RK, weights_LNK, ends_L, 2.0**-12 if out_RN.is_cuda else 2.0**-20)
