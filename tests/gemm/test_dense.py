"""Dense products by the grouped kernels: against float64, and to the bit what one group of rows gets."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock._triton import HAS_TRITON
from crossdock.errors import ConfigError
from crossdock.gemm import (
    dense_gemm,
    dense_swiglu,
    dense_swiglu_fp8,
    grouped_gemm,
    grouped_swiglu,
    grouped_swiglu_fp8,
    hopper,
    linear_fp8,
    quantize_blocks,
    quantize_rows,
    swiglu_quantize,
)

BACKENDS = ["torch", "triton"]
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6}  # interpreted bf16 truncates
SIZES = [(1, 1, 1), (5, 130, 70), (64, 32, 64), (65, 48, 64), (0, 16, 64)]  # rows, columns, inner


def case(rows: int, columns: int, inner: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """x_MK and w_NK, rows of x 10^-2 ... 10^2."""
    generator = torch.Generator().manual_seed(rows * 10007 + columns * 101 + inner)
    x_MK = torch.randn(rows, inner, generator=generator) * 10 ** (4 * torch.rand(rows, 1, generator=generator) - 2)
    return x_MK.to(device, dtype), torch.randn(columns, inner, generator=generator).to(device, dtype)


def ends_of(rows: int, device: torch.device) -> Tensor:
    return torch.tensor([rows], dtype=torch.int32, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "columns", "inner"), SIZES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.usefixtures("poison")
def test_product(backend: Any, rows: int, columns: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
    x_MK, w_NK = case(rows, columns, inner, dtype, device)
    out_MN = dense_gemm(x_MK, w_NK, backend)
    assert out_MN.dtype == dtype and out_MN.shape == (rows, columns)
    size_MN = x_MK.double().abs() @ w_NK.double().abs().t()
    assert ((out_MN.double() - x_MK.double() @ w_NK.double().t()).abs() <= size_MN * ROUNDING[dtype]).all()
    if backend == "triton":
        assert torch.equal(out_MN, grouped_gemm(x_MK, w_NK[None], ends_of(rows, device), backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "columns", "inner"), SIZES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.usefixtures("poison")
def test_swiglu(backend: Any, rows: int, columns: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
    x_MK, w_NK = case(rows, 2 * columns, inner, dtype, device)
    out_MF = dense_swiglu(x_MK, w_NK, backend)
    gate_MF, up_MF = (x_MK.double() @ half.double().t() for half in w_NK.chunk(2))
    size_MF = x_MK.double().norm(dim=1, keepdim=True) * w_NK.double().norm(dim=1).amax()
    bound = size_MF * (1 + up_MF.abs() + gate_MF.abs()) * ROUNDING[dtype]
    assert out_MF.dtype == dtype and out_MF.shape == (rows, columns)
    assert ((out_MF.double() - torch.nn.functional.silu(gate_MF) * up_MF).abs() <= bound).all()
    if backend == "triton":
        assert torch.equal(out_MF, grouped_swiglu(x_MK, w_NK[None], ends_of(rows, device), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner", [128, 96])
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.usefixtures("poison")
def test_swiglu_fp8(backend: Any, inner: int, pow2: bool, device: torch.device) -> None:
    """To the bit the separate steps, and the grouped product of one group."""
    for rows in (0, 1, 65):
        x_MK, w_NK = case(rows, 2 * inner, 200, torch.bfloat16, device)
        x_codes, weights = quantize_rows(x_MK, pow2=pow2), quantize_blocks(w_NK)
        found = dense_swiglu_fp8(x_MK, *weights, pow2=pow2, backend=backend)
        both_M2F = linear_fp8(x_codes, *weights, backend=backend)
        ends_1 = ends_of(rows, device)
        one_group = [tensor[None] for tensor in weights]
        for expected in (
            swiglu_quantize(both_M2F, pow2=pow2, backend=backend),
            grouped_swiglu_fp8(*x_codes, *one_group, ends_1, pow2=pow2, backend=backend),  # type: ignore[misc]
            dense_swiglu_fp8(x_codes, *weights, pow2=pow2, backend=backend),
        ):
            assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
            assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_company(backend: Any, device: torch.device) -> None:
    x_MK, w_NK = case(70, 96, 200, torch.float32, device)
    for product in (dense_gemm, dense_swiglu):
        whole = product(x_MK, w_NK, backend)
        for row in (0, 63, 69):
            assert torch.equal(product(x_MK[row : row + 1], w_NK, backend)[0], whole[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: Any, device: torch.device) -> None:
    """Of sums over a weight that differs by place; forward bits are those without."""
    x_MK, w_NK = case(5, 48, 20, torch.float32, device)
    for product in (dense_gemm, dense_swiglu):
        leaves = [tensor.clone().requires_grad_() for tensor in (x_MK, w_NK)]
        exact = [tensor.double().requires_grad_() for tensor in (x_MK, w_NK)]
        out, out_exact = product(*leaves, backend), product(*exact, "torch")
        assert torch.equal(out.detach(), product(x_MK, w_NK, backend))
        spread = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        (out * spread).sum().backward()
        (out_exact * spread.double()).sum().backward()
        for found, expected in zip(leaves, exact, strict=True):
            assert found.grad is not None and expected.grad is not None
            assert (found.grad - expected.grad).abs().max() <= 1e-5 * expected.grad.abs().max()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_hoppers_products_have_the_same_bits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cuda" and not hopper.is_hopper(device):
        pytest.skip("needs Hopper or the interpreter")
    x_MK, w_NK = case(70, 256, 128, torch.bfloat16, device)
    weights = quantize_blocks(w_NK)
    found: list[list[Tensor]] = []
    taken: list[Any] = []
    launch = hopper._launch
    monkeypatch.setattr(hopper, "_launch", lambda kind: taken.append(kind) or launch(kind))
    for on_hopper in (False, True):
        monkeypatch.setattr(hopper, "is_hopper", lambda device, on=on_hopper: on)
        codes, scale = dense_swiglu_fp8(x_MK, *weights, backend="triton")
        outputs = [dense_gemm(x_MK, w_NK, "triton"), dense_swiglu(x_MK, w_NK, "triton")]
        found.append([*outputs, codes.view(torch.uint8), scale])
    assert taken == ["fp8_block_swiglu", "bf16", "bf16_swiglu"]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_wrong_arguments(device: torch.device) -> None:
    x_MK, w_NK = case(2, 16, 32, torch.float32, device)
    for product in (dense_gemm, dense_swiglu):
        with pytest.raises(ConfigError, match="x_MK has inner size K=8, but w_NK has K=32"):
            product(x_MK[:, :8], w_NK, "triton")
        with pytest.raises(ConfigError, match=r"w_NK must be torch\.float32 \(the dtype of x_MK\)"):
            product(x_MK, w_NK.half(), "triton")
        with pytest.raises(ConfigError, match=r"w_NK must have 2 dimensions \[N, K\]"):
            product(x_MK, w_NK[None], "triton")
        with pytest.raises(ConfigError, match=r"x_MK must be .*found torch\.float64"):
            product(x_MK.double(), w_NK.double(), "triton")
    with pytest.raises(ConfigError, match="gate_up_2FK must have an even number of rows"):
        dense_swiglu(x_MK, w_NK[:15], "triton")
    codes, scale = quantize_blocks(w_NK)
    with pytest.raises(ConfigError, match=r"wscale_BB must have shape \(1, 1\)"):
        dense_swiglu_fp8(x_MK, codes, scale[:0], backend="triton")
