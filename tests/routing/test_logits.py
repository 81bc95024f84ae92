"""The router's product: exactness, independence of rows, both forms of the kernel, gradients."""

import pytest
import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.routing import logits as module
from crossdock.routing import router_gemm, router_gemm_ref

DTYPES = [(x, w) for x in (torch.float32, torch.bfloat16) for w in (torch.float32, torch.bfloat16)]
BACKENDS = ["torch", "triton"]


def operands(rows: int, inner: int, experts: int, x: torch.dtype, w: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(inner)
    shapes = (rows, inner), (experts, inner)
    return [torch.randn(s, generator=generator).to(device, d) for s, d in zip(shapes, (x, w), strict=True)]


def poisoned_empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def assert_exact(found_TE: Tensor, x_TD: Tensor, w_ED: Tensor) -> None:
    """Within a few float32 roundings of the sum of absolute products, which no 16-bit or tf32 weight would meet."""
    expected_TE = x_TD.double() @ w_ED.double().T
    size_TE = x_TD.double().abs() @ w_ED.double().abs().T
    assert found_TE.dtype == torch.float32
    assert ((found_TE - expected_TE).abs() / size_TE).max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x", "w"), DTYPES)
@pytest.mark.parametrize(("rows", "inner", "experts"), [(1, 256, 16), (3, 512, 20), (5, 300, 20), (67, 520, 70)])
def test_is_exact(
    backend: str,
    x: torch.dtype,
    w: torch.dtype,
    rows: int,
    inner: int,
    experts: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x_TD, w_ED = operands(rows, inner, experts, x, w, device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        found_TE = router_gemm(x_TD, w_ED, backend)
        again_TE = router_gemm(x_TD, w_ED, backend)
    assert_exact(found_TE, x_TD, w_ED)
    assert torch.equal(found_TE, again_TE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x", "w"), DTYPES)
def test_rows_do_not_depend_on_their_company(
    backend: str, x: torch.dtype, w: torch.dtype, device: torch.device
) -> None:
    x_TD, w_ED = operands(66, 600, 9, x, w, device)
    whole_TE = router_gemm(x_TD, w_ED, backend)
    for rows in (slice(0, 1), slice(65, 66), slice(3, 8), slice(1, 66)):
        assert torch.equal(router_gemm(x_TD[rows], w_ED, backend), whole_TE[rows])


@pytest.mark.parametrize("inner", [768, 900])
@pytest.mark.parametrize(("x", "w"), DTYPES)
def test_splitting_does_not_show(
    x: torch.dtype, w: torch.dtype, inner: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_TD, w_ED = operands(3, inner, 12, x, w, device)
    split_TE = router_gemm(x_TD, w_ED, "triton")
    monkeypatch.setattr(module, "SPLIT_BELOW", 0)
    assert torch.equal(router_gemm(x_TD, w_ED, "triton"), split_TE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, device: torch.device) -> None:
    assert router_gemm(torch.empty(0, 64, device=device), torch.ones(8, 64, device=device), backend).shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(backend: str, device: torch.device) -> None:
    x_TD, w_ED = operands(6, 96, 10, torch.float32, torch.float32, device)
    expected_TE = router_gemm_ref(x_TD, w_ED)
    for strided_TD in (x_TD.T.contiguous().T, torch.cat([x_TD, x_TD], 1)[:, :96]):
        torch.testing.assert_close(router_gemm(strided_TD, w_ED, backend), expected_TE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x", "w"), DTYPES)
def test_gradients(backend: str, x: torch.dtype, w: torch.dtype, device: torch.device) -> None:
    x_TD, w_ED = (t.requires_grad_() for t in operands(5, 96, 10, x, w, device))
    grad_TE = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)).to(device)
    found = torch.autograd.grad(router_gemm(x_TD, w_ED, backend), (x_TD, w_ED), grad_TE)
    expected = grad_TE.double() @ w_ED.double(), grad_TE.double().T @ x_TD.double()
    for gradient, exact, dtype in zip(found, expected, (x, w), strict=True):
        assert gradient.dtype == dtype
        tolerance = 2e-6 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(gradient.double(), exact, rtol=tolerance, atol=tolerance)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ConfigError, match="w_ED"):
        router_gemm(torch.zeros(2, 8), torch.zeros(4, 9))
    with pytest.raises(ConfigError, match="x_TD"):
        router_gemm(torch.zeros(2, 8, dtype=torch.int32), torch.zeros(4, 8))


def test_every_audit_signature_names_the_kernels_arguments() -> None:
    for spec in module.AUDIT:
        assert list(spec.signature) == list(spec.kernel.arg_names)
        assert set(spec.constexprs) == {name for name, kind in spec.signature.items() if kind == "constexpr"}
