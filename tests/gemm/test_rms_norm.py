"""RMS norm against float64, and its fused forms against the separate steps, to the bit."""

import pytest
import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock.errors import ConfigError
from crossdock.gemm import quantize_rows, rms_norm_kernel
from crossdock.gemm.rms_norm import QuantizedNorm, rms_norm, rms_norm_quantize

BACKENDS = ["torch", "triton"]
EPS = 1e-6
SIZES = [(1, 1), (3, 128), (5, 129), (2, 300), (0, 256), (2, 1024)]
# of one value: rounding to the dtype (bf16 twice over where the interpreter cuts bits off), and float32 on the way
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6}


def case(tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD with rows 10^-3 ... 10^3, weight_D, residual_TD."""
    generator = torch.Generator().manual_seed(tokens * 10007 + size)
    size_of_row = 10 ** (6 * torch.rand(tokens, 1, generator=generator) - 3)
    x_TD = torch.randn(tokens, size, generator=generator) * size_of_row
    residual_TD = torch.randn(tokens, size, generator=generator) * size_of_row
    weight_D = 1 + torch.randn(size, generator=generator) / 4
    return tuple(tensor.to(device, dtype) for tensor in (x_TD, weight_D, residual_TD))  # type: ignore[return-value]


@pytest.fixture(params=[rms_norm_kernel.WHOLE_STRIPS, 2])
def strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many strips of a row a program holds: all of these tests' rows, or two, so that it goes over them twice."""
    monkeypatch.setattr(rms_norm_kernel, "WHOLE_STRIPS", request.param)
    return int(request.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "size"), SIZES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.usefixtures("poison", "strips")
def test_against_float64(backend: str, tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    x_TD, weight_D, residual_TD = case(tokens, size, dtype, device)
    y_TD, sum_TD = rms_norm(x_TD, weight_D, EPS, residual_TD, backend)
    assert y_TD.dtype == sum_TD.dtype == dtype and y_TD.shape == sum_TD.shape == (tokens, size)
    exact_TD = x_TD.double() + residual_TD.double()
    assert ((sum_TD.double() - exact_TD).abs() <= exact_TD.abs() * ROUNDING[dtype]).all()
    root_T1 = (sum_TD.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    expected_TD = sum_TD.double() / root_T1 * weight_D.double()
    least = torch.finfo(dtype).smallest_normal
    assert ((y_TD.double() - expected_TD).abs() <= expected_TD.abs() * ROUNDING[dtype] + least).all()
    assert torch.equal(rms_norm(sum_TD, weight_D, EPS, backend=backend), y_TD)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "size"), SIZES)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.usefixtures("poison", "strips")
def test_quantised_is_the_separate_steps(
    backend: str, tokens: int, size: int, pow2: bool, device: torch.device
) -> None:
    x_TD, weight_D, residual_TD = case(tokens, size, torch.bfloat16, device)
    y_TD, sum_TD = rms_norm(x_TD, weight_D, EPS, residual_TD, backend)
    q_TD, scale_TB = quantize_rows(y_TD, pow2=pow2, backend=backend)
    whole = rms_norm_quantize(x_TD, weight_D, EPS, residual_TD, pow2=pow2, with_rows=True, backend=backend)
    assert whole.rows_TD is not None and torch.equal(whole.rows_TD, y_TD)
    assert whole.residual_TD is not None and torch.equal(whole.residual_TD, sum_TD)
    bare = rms_norm_quantize(sum_TD, weight_D, EPS, pow2=pow2, backend=backend)
    assert bare.rows_TD is None and bare.residual_TD is None
    for seen in (whole, bare):
        assert torch.equal(seen.q_TD.view(torch.uint8), q_TD.view(torch.uint8))
        assert torch.equal(seen.scale_TB, scale_TB)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_company(backend: str, device: torch.device) -> None:
    x_TD, weight_D, residual_TD = case(7, 300, torch.float32, device)
    whole = rms_norm_quantize(x_TD, weight_D, EPS, residual_TD, with_rows=True, backend=backend)
    for row in (slice(0, 1), slice(6, 7), slice(2, 5)):
        part = rms_norm_quantize(x_TD[row], weight_D, EPS, residual_TD[row], with_rows=True, backend=backend)
        assert bits(part) == bits(QuantizedNorm(*(out[row] for out in whole if out is not None)))


def bits(normed: QuantizedNorm) -> list[list[int]]:
    return [out.contiguous().view(torch.uint8).flatten().tolist() for out in normed if out is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_what_does_not_fit_stays_in_its_row(backend: str, device: torch.device) -> None:
    """A NaN or an infinity makes its own row NaN; zeros stay zeros."""
    x_TD, weight_D, _ = case(4, 200, torch.float32, device)
    clean = rms_norm(x_TD, weight_D, EPS, backend=backend)
    x_TD[0, 3], x_TD[1, 150], x_TD[2] = torch.nan, torch.inf, 0.0
    y_TD, normed = (
        rms_norm(x_TD, weight_D, EPS, backend=backend),
        rms_norm_quantize(x_TD, weight_D, EPS, backend=backend),
    )
    assert y_TD[0].isnan().all() and y_TD[1, 150].isnan() and (y_TD[2] == 0).all()
    assert torch.equal(y_TD[3], clean[3])
    assert normed.scale_TB[0].isnan().all() and not normed.q_TD[0].float().any()
    assert not normed.scale_TB[2:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_apart(backend: str, device: torch.device) -> None:
    x_TD, weight_D, residual_TD = case(4, 256, torch.float16, device)
    expected = rms_norm_quantize(x_TD[:, :130].contiguous(), weight_D[:130], EPS, residual_TD[:, :130].contiguous())
    seen = rms_norm_quantize(x_TD[:, :130], weight_D[:130], EPS, residual_TD[:, :130], backend=backend)
    if backend == "torch":
        assert bits(seen) == bits(expected)
    columns = rms_norm_quantize(
        x_TD.t().contiguous().t()[:, :130], weight_D[:130], EPS, residual_TD[:, :130], backend=backend
    )
    assert bits(columns) == bits(seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend: str, device: torch.device) -> None:
    """Where one is wanted, the same numbers come with torch's gradient."""
    x_TD, weight_D, residual_TD = (tensor.requires_grad_() for tensor in case(3, 130, torch.float32, device))
    y_TD, sum_TD = rms_norm(x_TD, weight_D, EPS, residual_TD, backend)
    (y_TD.square().sum() + sum_TD.sum()).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (x_TD, weight_D, residual_TD))
    assert not rms_norm_quantize(x_TD, weight_D, EPS, residual_TD, backend=backend).scale_TB.requires_grad


def test_wrong_arguments() -> None:
    x_TD, weight_D = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ConfigError, match=r"x_TD must have 2 dimensions \[T, D\], found shape \(8,\)"):
        rms_norm(weight_D, weight_D, EPS)
    with pytest.raises(ConfigError, match=r"weight_D must have shape \(8,\) .*found \(7,\)"):
        rms_norm(x_TD, weight_D[:7], EPS)
    with pytest.raises(ConfigError, match=r"weight_D must be torch\.float32"):
        rms_norm(x_TD, weight_D.half(), EPS)
    with pytest.raises(ConfigError, match=r"residual_TD must have shape \(2, 8\) .*found \(1, 8\)"):
        rms_norm(x_TD, weight_D, EPS, x_TD[:1])
    with pytest.raises(ConfigError, match=r"residual_TD must be torch\.float32"):
        rms_norm_quantize(x_TD, weight_D, EPS, x_TD.half())
    with pytest.raises(ConfigError, match=r"x_TD must be .*found torch\.float64"):
        rms_norm_quantize(x_TD.double(), weight_D.double(), EPS)


def test_specs_fit_their_kernel() -> None:
    specs: list[KernelSpec] = rms_norm_kernel.AUDIT
    for spec in specs:
        assert list(spec.signature) == list(spec.kernel.arg_names)
        assert {name for name, kind in spec.signature.items() if kind == "constexpr"} == set(spec.constexprs)
