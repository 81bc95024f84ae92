"""Quantisation: the kernel against its reference to the bit, and both against what e4m3 promises."""

import pytest
import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.gemm import (
    E4M3_MAX,
    QuantSpec,
    dequantize_blocks,
    dequantize_rows,
    dequantize_whole_rows,
    quantize_blocks,
    quantize_rows,
    quantize_whole_rows,
)

BACKENDS = ["torch", "triton"]
SHAPES = [(1, 1), (3, 128), (2, 129), (5, 300), (1, 1100), (4, 2048)]


def decades(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal values times 10^-4 ... 10^4, another factor for each row and strip."""
    generator = torch.Generator().manual_seed(rows * 10007 + cols)
    factors = 10 ** (8 * torch.rand(rows, -(-cols // 128), generator=generator) - 4)
    x = torch.randn(rows, cols, generator=generator) * factors.repeat_interleave(128, 1)[:, :cols]
    return x.clamp(-6e4, 6e4).to(dtype).to(device)


def bits(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and scales as integers, so that NaN equals NaN; -0 counts as 0."""
    codes, scale = pair
    raw = codes.view(torch.uint8)
    return torch.where(raw == 0x80, 0, raw), scale.view(torch.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.usefixtures("poison")
def test_kernel_equals_reference(shape: tuple[int, int], dtype: torch.dtype, pow2: bool, device: torch.device) -> None:
    x_RK = decades(*shape, dtype, device)
    first = bits(quantize_rows(x_RK, pow2=pow2, backend="triton"))
    again = bits(quantize_rows(x_RK, pow2=pow2, backend="triton"))
    expected = bits(quantize_rows(x_RK, pow2=pow2, backend="torch"))
    for a, b, c in zip(first, again, expected, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pow2", [False, True])
def test_rows_come_back_within_half_a_step(backend: str, pow2: bool, device: torch.device) -> None:
    x_RK = decades(6, 700, torch.float32, device)
    q_RK, scale_RB = quantize_rows(x_RK, pow2=pow2, backend=backend)
    scale_RK = scale_RB.repeat_interleave(128, 1)[:, :700]
    error = (dequantize_rows(q_RK, scale_RB) - x_RK).abs()
    half_step = torch.maximum(x_RK.abs() * 2.0**-4, scale_RK * 2.0**-10)  # 3 mantissa bits; subnormals step by 2^-9
    assert (error <= half_step * (1 + 1e-6)).all()
    amax_RB = torch.stack([strip.abs().amax(1) for strip in x_RK.split(128, 1)], 1)
    ratio_RB = scale_RB * E4M3_MAX / amax_RB
    if pow2:
        assert (torch.frexp(scale_RB)[0] == 0.5).all()
        assert ((ratio_RB >= 1 - 1e-6) & (ratio_RB < 2)).all()
    else:
        torch.testing.assert_close(ratio_RB, torch.ones_like(ratio_RB))


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_and_the_midpoints_between_them(backend: str, device: torch.device) -> None:
    """A strip that holds 448 has scale 1, so every code comes back as it is, and ties go to the even one."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    strips = torch.zeros(4, 128)
    strips[0, :127], strips[1, :127] = codes, -codes
    strips[2, :126], strips[3, :126] = middles, -middles
    strips[2:, 127] = E4M3_MAX
    q_RK, scale_RB = quantize_rows(strips.to(device), backend=backend)
    assert (scale_RB == 1).all()
    assert torch.equal(q_RK[:2].float().cpu(), strips[:2])
    assert torch.equal(q_RK[2:].float().cpu(), strips[2:].to(torch.float8_e4m3fn).float())
    assert (q_RK[2, :126].cpu().view(torch.uint8) % 2 == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_strip_only(backend: str, value: float, device: torch.device) -> None:
    x_RK = torch.randn(2, 300, device=device)
    clean = dequantize_rows(*quantize_rows(x_RK, backend=backend))
    x_RK[1, 130] = value
    q_RK, scale_RB = quantize_rows(x_RK, backend=backend)
    back = dequantize_rows(q_RK, scale_RB)
    assert (q_RK[1, 128:256].float() == 0).all()
    assert back[1, 128:256].isnan().all()
    back[1, 128:256] = clean[1, 128:256]
    assert torch.equal(back, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pow2", [False, True])
def test_zeros_tiny_and_huge(backend: str, pow2: bool, device: torch.device) -> None:
    x_RK = torch.tensor([0.0, 1e-40, 1e-30, 3e38], device=device)[:, None].repeat(1, 130)
    q_RK, scale_RB = quantize_rows(x_RK, pow2=pow2, backend=backend)
    back = dequantize_rows(q_RK, scale_RB)
    assert (back[0] == 0).all()
    torch.testing.assert_close(back[1], x_RK[1], rtol=0, atol=2.0**-126)  # a device may flush what is subnormal
    torch.testing.assert_close(back[2:], x_RK[2:], rtol=2.0**-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
def test_nothing_to_quantise(backend: str, shape: tuple[int, int], device: torch.device) -> None:
    q_RK, scale_RB = quantize_rows(torch.zeros(shape, device=device), backend=backend)
    assert q_RK.shape == shape and scale_RB.shape == (shape[0], -(-shape[1] // 128))
    assert dequantize_rows(q_RK, scale_RB).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows(backend: str, device: torch.device) -> None:
    wide = torch.randn(140, 10, device=device)
    for view in (wide[:, :7], wide.t(), wide.t()[::2, 1:]):
        expected = quantize_rows(view.contiguous(), backend=backend)
        for a, b in zip(bits(quantize_rows(view, backend=backend)), bits(expected), strict=True):
            assert torch.equal(a, b)


def test_offsets_beyond_int32(device: torch.device) -> None:
    far = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)  # its pages stay untouched but for a few
    x_RK = far.as_strided((3, 200), (2**30, 1))
    x_RK.copy_(decades(3, 200, torch.bfloat16, device))
    expected = quantize_rows(x_RK.contiguous(), backend="torch")
    for a, b in zip(bits(quantize_rows(x_RK, backend="triton")), bits(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (130, 300), (2, 3, 200, 129)])
@pytest.mark.parametrize("pow2", [False, True])
def test_blocks(shape: tuple[int, ...], pow2: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)).to(device)
    q, scale = quantize_blocks(w, pow2=pow2)
    assert q.shape == shape and scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    back = dequantize_blocks(q, scale)
    for n in range(0, shape[-2], 128):
        for k in range(0, shape[-1], 128):
            block, seen = w[..., n : n + 128, k : k + 128], back[..., n : n + 128, k : k + 128]
            step = scale[..., n // 128, k // 128, None, None]
            if not pow2:
                torch.testing.assert_close(step * E4M3_MAX, block.abs().amax((-1, -2), keepdim=True))
            half_step = torch.maximum(block.abs() * 2.0**-4, step * 2.0**-10)
            assert ((seen - block).abs() <= half_step * (1 + 1e-6)).all()


def test_blocks_that_are_not_finite_or_zero(device: torch.device) -> None:
    w_NK = torch.ones(256, 256, device=device)
    w_NK[:128, :128] = 0
    w_NK[200, 3] = float("nan")
    w_NK[0, 255] = float("inf")
    back = dequantize_blocks(*quantize_blocks(w_NK.t())).t()  # a transposed view goes the same way
    assert (back[:128, :128] == 0).all() and (back[128:, 128:] == 1).all()
    assert back[128:, :128].isnan().all() and back[:128, 128:].isnan().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (2, 1100), (2, 3, 70), (5,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.usefixtures("poison")
def test_whole_rows(shape: tuple[int, ...], dtype: torch.dtype, pow2: bool, device: torch.device) -> None:
    """One scale a row: the kernel equals the reference to the bit, and values come back within half a step."""
    x_RK = decades(torch.Size(shape[:-1]).numel(), shape[-1], dtype, device).view(shape)
    q_RK, scale_R = pair = quantize_whole_rows(x_RK, pow2=pow2, backend="triton")
    assert q_RK.shape == shape and scale_R.shape == shape[:-1]
    for backend in BACKENDS:
        again = quantize_whole_rows(x_RK, pow2=pow2, backend=backend)
        assert all(map(torch.equal, bits(pair), bits(again)))
    error = (dequantize_whole_rows(q_RK, scale_R) - x_RK.float()).abs()
    half_step = torch.maximum(x_RK.float().abs() * 2.0**-4, scale_R[..., None] * 2.0**-10)
    assert (error <= half_step * (1 + 1e-6)).all()
    ratio_R = scale_R * E4M3_MAX / x_RK.float().abs().amax(-1)
    assert ((ratio_R >= 1 - 1e-6) & (ratio_R < (2 if pow2 else 1 + 1e-6))).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_rows_that_are_not_finite_zero_or_empty(backend: str, device: torch.device) -> None:
    x_RK = torch.randn(4, 300, device=device)
    x_RK[1, 130], x_RK[2], x_RK[3, 7] = float("nan"), 0.0, float("inf")
    q_RK, scale_R = quantize_whole_rows(x_RK, backend=backend)
    back_RK = dequantize_whole_rows(q_RK, scale_R)
    assert back_RK[1].isnan().all() and back_RK[3].isnan().all() and (back_RK[2] == 0).all()
    assert (q_RK[[1, 2, 3]].float() == 0).all() and back_RK[0].isfinite().all()
    for shape in ((0, 5), (3, 0)):
        codes, scale = quantize_whole_rows(torch.zeros(shape, device=device), backend=backend)
        assert codes.shape == shape and scale.shape == shape[:1] and (scale > 0).all()
    strided = torch.randn(300, 4, device=device).t()
    expected = quantize_whole_rows(strided.contiguous(), backend=backend)
    assert all(map(torch.equal, bits(quantize_whole_rows(strided, backend=backend)), bits(expected)))


def test_dequantize_rounds_once_to_the_dtype_asked_for() -> None:
    q_RK, scale_RB = quantize_rows(torch.randn(3, 200))
    assert torch.equal(dequantize_rows(q_RK, scale_RB, torch.bfloat16), dequantize_rows(q_RK, scale_RB).bfloat16())


def test_spec() -> None:
    assert QuantSpec().kind == "none"
    assert QuantSpec("fp8_block", pow2_scales=True).pow2_scales
    assert QuantSpec("fp8_row").kind == "fp8_row"
    with pytest.raises(ConfigError, match=r"QuantSpec\.kind must be 'none', 'fp8_block' or 'fp8_row', found 'int4'"):
        QuantSpec("int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pow2_scales is set, but kind 'none'"):
        QuantSpec(pow2_scales=True)


def test_bad_arguments() -> None:
    q_RK, scale_RB = quantize_rows(torch.randn(3, 200))
    wq_NK, wscale = quantize_blocks(torch.randn(130, 200))
    with pytest.raises(ConfigError, match=r"x_RK must have 2 dimensions \[R, K\], found shape \(3,\)"):
        quantize_rows(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"x_RK must be .*float32.*, found torch.int32"):
        quantize_rows(torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(ConfigError, match="backend must be 'auto', 'torch' or 'triton', found 'cuda'"):
        quantize_rows(torch.zeros(3, 3), backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"w_NK must have at least 2 dimensions .*\(3,\)"):
        quantize_blocks(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"w_NK must be .*, found torch.float64"):
        quantize_blocks(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"scale_RB must have shape \(3, 2\).*found \(3, 1\)"):
        dequantize_rows(q_RK, scale_RB[:, :1])
    with pytest.raises(ConfigError, match=r"q_RK must be torch.float8_e4m3fn .*, found torch.float32"):
        dequantize_rows(q_RK.float(), scale_RB)
    with pytest.raises(ConfigError, match=r"scale must be torch.float32 .*, found torch.float64"):
        dequantize_blocks(wq_NK, wscale.double())
    with pytest.raises(ConfigError, match=r"scale must have shape \(2, 2\).*found \(2,\)"):
        dequantize_blocks(wq_NK, wscale[0])
    with pytest.raises(ConfigError, match=r"q_NK must have at least 2 dimensions"):
        dequantize_blocks(wq_NK[0], wscale)
    with pytest.raises(ConfigError, match=r"x_RK must have at least 1 dimension \[\.\.\., K\], found shape \(\)"):
        quantize_whole_rows(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"x_RK must be .*float32.*, found torch.int32"):
        quantize_whole_rows(torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"scale_R must have shape \(3,\) \(one scale per row .*found \(3, 2\)"):
        dequantize_whole_rows(q_RK, scale_RB)
    with pytest.raises(ConfigError, match="scale is on meta, but q_NK is on cpu"):
        dequantize_blocks(wq_NK, wscale.to("meta"))
