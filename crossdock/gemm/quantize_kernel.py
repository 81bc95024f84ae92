# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""Quantisation of rows on the device, per 1x128 and per row, and the piece of it that fused kernels share.

A strip is 128 neighbouring columns of one row. A program takes one row and up to 8 strips of it:

    row r:  | strip 0 | strip 1 | ... | strip 7 |  -> 1024 codes, 8 scales

With one scale a row, a row is one strip and a program's, however long: its largest value must be known before its first
code, and reading the row twice was rejected. It stays in registers up to 16384 columns.

Legend: R rows, K columns, B strips of 128 a row, S strips a program, C columns of a strip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton

BLOCK = 128
E4M3_MAX = 448.0
MIN_SCALE = 2.0**-126  # the smallest normal float32: a strip of zeros divides by it and stays zero
STRIPS = 8


def quantize_rows_ref(x_RK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """The specification, and the torch backend: [R, K] -> codes [R, K] e4m3, scales [R, B] float32."""
    rows, inner = x_RK.shape
    x_RK = F.pad(x_RK.float(), (0, -inner % BLOCK)) if inner % BLOCK else x_RK.float()  # a pad by nothing copies too
    x_RBC = x_RK.reshape(rows, -(-inner // BLOCK), BLOCK)
    scale_RB = scale_of(x_RBC.abs().amax(-1), pow2)
    q_RBC = encode(x_RBC, scale_RB[..., None])
    return q_RBC.reshape(rows, q_RBC.shape[1] * BLOCK)[:, :inner].contiguous(), scale_RB


def quantize_whole_rows_ref(x_RK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """The same with one scale a row: [R, K] -> codes [R, K] e4m3, scales [R] float32."""
    x_RK = x_RK.float()
    amax_R = x_RK.abs().amax(-1) if x_RK.shape[1] else x_RK.new_zeros(x_RK.shape[0])
    scale_R = scale_of(amax_R, pow2)
    return encode(x_RK, scale_R[:, None]), scale_R


def scale_of(amax: Tensor, pow2: bool) -> Tensor:
    """The multiplier that takes a block's codes back: amax / 448, rounded up to a power of two where asked.

    Unlike 448 / amax it cannot overflow. NaN where amax is NaN or infinite.
    """
    scale = (amax / E4M3_MAX).clamp(min=MIN_SCALE)
    if pow2:  # a float32's mantissa is its low 23 bits: carry any of them into the exponent
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)
    return torch.where(amax < torch.inf, scale, torch.nan)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale as e4m3, and 0 where the scale is NaN, so that codes are never NaN themselves.

    A CPU looks whether any is, which costs nothing there, where choosing costs as much as the rest.
    """
    scaled = x / scale
    if x.device.type != "cpu" or bool(scale.isnan().any()):
        scaled = torch.where(scale == scale, scaled, 0.0)
    return scaled.to(torch.float8_e4m3fn)


def spread(scale: Tensor, size: int, dim: int) -> Tensor:
    """Each scale of `dim` repeated over the columns it stands for: ceil(size / 128) -> size."""
    return scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)


@triton.jit
def quantize_strips(x_SC, E4M3_MAX: tl.constexpr, MIN_SCALE: tl.constexpr, POW2: tl.constexpr, PRE_ROUND: tl.constexpr):
    """float32 strips [S, C] -> (x / scale [S, C] float32, scale [S]): what `scale_of` and `encode` do but for the cast.

    PRE_ROUND puts the values on e4m3's grid first: the interpreter's own cast to it rounds wrongly.
    """
    amax_S = tl.max(tl.where(x_SC == x_SC, tl.abs(x_SC), float("inf")), axis=1)
    finite_S = amax_S < float("inf")
    scale_S = tl.maximum(tl.div_rn(amax_S, tl.full(amax_S.shape, E4M3_MAX, tl.float32)), MIN_SCALE)
    if POW2:
        bits_S = (scale_S.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000
        scale_S = bits_S.to(tl.float32, bitcast=True)
    divisor_SC = tl.broadcast_to(scale_S[:, None], x_SC.shape)
    scaled_SC = tl.div_rn(tl.where(finite_S[:, None], x_SC, 0.0), divisor_SC)
    if PRE_ROUND:  # adding 1.5 * 2^23 steps pushes what lies below a step out of the mantissa, to nearest even
        power_SC = (scaled_SC.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift_SC = tl.maximum(power_SC, 0.015625) * 1572864.0
        scaled_SC = (scaled_SC + shift_SC) - shift_SC
    return scaled_SC, tl.where(finite_S, scale_S, float("nan"))


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [R, K], rows `stride_x` apart
    q_ptr,  # [R, K] contiguous
    scale_ptr,  # [R, B] contiguous
    stride_x,
    K,
    B,
    E4M3_MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    POW2: tl.constexpr,
    PRE_ROUND: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    strip_S = tl.program_id(1) * STRIPS + tl.arange(0, STRIPS)
    col_SC = strip_S[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x_SC = tl.load(x_ptr + row * stride_x + col_SC, mask=col_SC < K, other=0.0).to(tl.float32)
    scaled_SC, scale_S = quantize_strips(x_SC, E4M3_MAX, MIN_SCALE, POW2, PRE_ROUND)
    tl.store(q_ptr + row * K + col_SC, scaled_SC.to(q_ptr.dtype.element_ty), mask=col_SC < K)
    tl.store(scale_ptr + row * B + strip_S, scale_S, mask=strip_S < B)


def quantize_rows_triton(x_RK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """`quantize_rows_ref` in one launch; the rows may be any stride apart."""
    rows, inner = x_RK.shape
    blocks = -(-inner // BLOCK)
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    q_RK = torch.empty((rows, inner), dtype=torch.float8_e4m3fn, device=x_RK.device)
    scale_RB = torch.empty((rows, blocks), dtype=torch.float32, device=x_RK.device)
    if q_RK.numel():
        quantize_rows_kernel[(rows, -(-blocks // STRIPS))](
            x_RK,
            q_RK,
            scale_RB,
            x_RK.stride(0),
            inner,
            blocks,
            **quantize_options(pow2),
        )
    return q_RK, scale_RB


def quantize_whole_rows_triton(x_RK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """`quantize_whole_rows_ref` in one launch, by the kernel for strips: one strip a row, wide enough for all of it."""
    rows, inner = x_RK.shape
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    q_RK = torch.empty((rows, inner), dtype=torch.float8_e4m3fn, device=x_RK.device)
    scale_R = torch.empty(rows, dtype=torch.float32, device=x_RK.device)
    if inner == 0:
        return q_RK, scale_R.fill_(MIN_SCALE)
    if rows:
        options = quantize_options(pow2) | whole_row(inner)
        quantize_rows_kernel[(rows, 1)](x_RK, q_RK, scale_R, x_RK.stride(0), inner, 1, **options)
    return q_RK, scale_R


def whole_row(inner: int) -> dict[str, int]:
    """How the kernel takes a row of `inner` columns whole: one strip, some 16 elements a thread at least."""
    block = max(BLOCK, 1 << (inner - 1).bit_length())
    return {"STRIPS": 1, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def quantize_options(pow2: bool) -> dict[str, float | bool | int]:
    """The compile-time arguments of a kernel that ends in `quantize_strips`."""
    return {
        "E4M3_MAX": E4M3_MAX,
        "MIN_SCALE": MIN_SCALE,
        "POW2": pow2,
        "PRE_ROUND": interpreting(),
        "STRIPS": STRIPS,
        "BLOCK": BLOCK,
    }


def _audit(pow2: bool, inner: int = 0) -> KernelSpec:
    """`inner` columns taken whole, or strips."""
    constexprs = quantize_options(pow2) | (whole_row(inner) if inner else {}) | {"PRE_ROUND": False}
    warps = constexprs.pop("num_warps", 4)
    types = {"x_ptr": "*bf16", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "stride_x": "i32", "K": "i32", "B": "i32"}
    return KernelSpec(
        name="quantize_whole_rows" if inner else "quantize_rows",
        kernel=quantize_rows_kernel,
        config=(f"bf16, K={inner}" if inner else f"bf16, {STRIPS}x{BLOCK} strips") + (", pow2 scales" if pow2 else ""),
        signature=types | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=int(warps),
    )


AUDIT = [_audit(pow2=False), _audit(pow2=True), _audit(pow2=False, inner=7168), _audit(pow2=True, inner=2048)]
