"""The dense FP8 product against float64, and against the grouped product of one group, to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock._triton import HAS_TRITON
from crossdock.errors import ConfigError
from crossdock.gemm import dequantize_blocks, dequantize_rows, grouped_gemm_fp8, hopper, quantize_blocks, quantize_rows
from crossdock.gemm.linear_fp8 import linear_fp8
from crossdock.gemm.rms_norm import rms_norm, rms_norm_quantize

BACKENDS = ["torch", "triton"]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}  # interpreted bf16 truncates
SIZES = [(1, 1, 1), (5, 130, 300), (64, 32, 128), (65, 48, 64), (0, 16, 128)]


def case(rows: int, columns: int, inner: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x_MK, wq_NK, wscale_BB; scales 10^-2 ... 10^2 apart, as a misplaced one then shows."""
    generator = torch.Generator().manual_seed(rows * 10007 + columns * 101 + inner)
    x_MK = torch.randn(rows, inner, generator=generator) * 10 ** (4 * torch.rand(rows, 1, generator=generator) - 2)
    wq_NK, wscale_BB = quantize_blocks(torch.randn(columns, inner, generator=generator))
    wscale_BB *= 10 ** (4 * torch.rand(wscale_BB.shape, generator=generator) - 2)
    return x_MK.to(device), wq_NK.to(device), wscale_BB.to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "columns", "inner"), SIZES)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.usefixtures("poison")
def test_against_float64(backend: str, rows: int, columns: int, inner: int, pow2: bool, device: torch.device) -> None:
    x_MK, wq_NK, wscale_BB = case(rows, columns, inner, device)
    q_MK, scale_MB = quantize_rows(x_MK, pow2=pow2)
    exact_MK, weight_NK = dequantize_rows(q_MK, scale_MB).double(), dequantize_blocks(wq_NK, wscale_BB).double()
    expected_MN, size_MN = exact_MK @ weight_NK.t(), exact_MK.abs() @ weight_NK.abs().t()
    ends_L = torch.tensor([rows], dtype=torch.int32, device=device)
    for dtype, rounding in ROUNDING.items():
        out_MN = linear_fp8(x_MK, wq_NK, wscale_BB, pow2=pow2, out_dtype=dtype, backend=backend)
        assert out_MN.dtype == dtype and out_MN.shape == (rows, columns)
        bound = size_MN * (2.0**-20 if device.type == "cpu" else 2.0**-12) + expected_MN.abs() * rounding
        assert ((out_MN.double() - expected_MN).abs() <= bound).all()
        quantised = (q_MK, scale_MB)
        assert torch.equal(out_MN, linear_fp8(quantised, wq_NK, wscale_BB, out_dtype=dtype, backend=backend))
        grouped = grouped_gemm_fp8(*quantised, wq_NK[None], wscale_BB[None], ends_L, dtype, backend)
        assert torch.equal(out_MN, grouped)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtype_of_the_rows(backend: str, device: torch.device) -> None:
    x_MK, wq_NK, wscale_BB = case(2, 16, 128, device)
    assert linear_fp8(x_MK.half(), wq_NK, wscale_BB, backend=backend).dtype == torch.float16
    assert linear_fp8(quantize_rows(x_MK), wq_NK, wscale_BB, backend=backend).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_company(backend: str, device: torch.device) -> None:
    """A row alone has the bits it has in a batch large enough for the other tile height."""
    x_MK, wq_NK, wscale_BB = case(70, 48, 200, device)
    whole_MN = linear_fp8(x_MK, wq_NK, wscale_BB, backend=backend)
    for row in (0, 63, 69):
        assert torch.equal(linear_fp8(x_MK[row : row + 1], wq_NK, wscale_BB, backend=backend)[0], whole_MN[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_behind_a_norm(backend: str, device: torch.device) -> None:
    """The fused norm's codes give the bits of the norm, the quantisation and the product one after another."""
    x_MK, wq_NK, wscale_BB = case(3, 16, 200, device)
    weight_K = torch.linspace(0.5, 2.0, 200, device=device)
    normed = rms_norm_quantize(x_MK, weight_K, 1e-6, backend=backend)
    fused = linear_fp8((normed.q_TD, normed.scale_TB), wq_NK, wscale_BB, out_dtype=torch.float32, backend=backend)
    apart = linear_fp8(rms_norm(x_MK, weight_K, 1e-6, backend=backend), wq_NK, wscale_BB, backend=backend)
    assert torch.equal(fused, apart)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_hoppers_product_has_the_same_bits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cuda" and not hopper.is_hopper(device):
        pytest.skip("needs Hopper or the interpreter")
    monkeypatch.setattr(hopper, "is_hopper", lambda device: False)
    x_MK, wq_NK, wscale_BB = case(70, 48, 208, device)
    portable_MN = linear_fp8(x_MK, wq_NK, wscale_BB, backend="triton")
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    taken: list[Any] = []
    launch = hopper._launch
    monkeypatch.setattr(hopper, "_launch", lambda kind: taken.append(kind) or launch(kind))
    assert torch.equal(linear_fp8(x_MK, wq_NK, wscale_BB, backend="triton"), portable_MN)
    assert taken == ["fp8_block"]


def test_wrong_arguments() -> None:
    x_MK, wq_NK, wscale_BB = case(2, 16, 128, torch.device("cpu"))
    q_MK, scale_MB = quantize_rows(x_MK)
    with pytest.raises(ConfigError, match="x_MK has inner size K=64, but wq_NK has K=128"):
        linear_fp8(x_MK[:, :64], wq_NK, wscale_BB)
    with pytest.raises(ConfigError, match=r"wscale_BB must have shape \(1, 1\)"):
        linear_fp8(x_MK, wq_NK, wscale_BB[:, :0])
    with pytest.raises(ConfigError, match=r"wq_NK must be torch\.float8_e4m3fn"):
        linear_fp8(x_MK, wq_NK.float(), wscale_BB)
    with pytest.raises(ConfigError, match=r"x_MK's scales must have shape \(2, 1\)"):
        linear_fp8((q_MK, scale_MB[:1]), wq_NK, wscale_BB)
    with pytest.raises(ConfigError, match=r"wq_NK must have 2 dimensions \[N, K\]"):
        linear_fp8(x_MK, wq_NK[None], wscale_BB)
    with pytest.raises(ConfigError, match=r"out_dtype must be .*found torch\.float64"):
        linear_fp8(x_MK, wq_NK, wscale_BB, out_dtype=torch.float64)
