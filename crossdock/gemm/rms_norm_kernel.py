# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""Residual sum, RMS norm and quantisation of rows in one launch: what stands between two blocks of a transformer.

    x + residual -> rounded to x's dtype: the new residual -> / sqrt(mean of squares + eps) * weight, rounded: the rows
                                                           -> codes and scales per 1x128 of those rows

Apart, these are three launches, each of which reads the row and writes it. Here a program takes a row and holds it in
registers (up to 16384 columns; a longer one is read a second time for the second half of the work). Every rounding of
the separate steps is kept, so fused and separate results of this backend are equal to the bit, and the order of a row's
sum depends on D alone.

Legend: T rows (tokens), D columns, B strips of 128 a row, S strips at once, C columns of a strip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.gemm.quantize_kernel import BLOCK, quantize_options, quantize_rows_ref, quantize_strips
from crossdock.gemm.tile_map import next_power_of_2

WHOLE_STRIPS = 128  # a row of up to so many stays in registers

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # rows, residual, codes, scales


def rms_norm_ref(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    quantize: bool,
    rows: bool,
    pow2: bool,
) -> Outputs:
    """The specification, and the torch backend. What is not asked for is None; the mean and what follows in float32."""
    x_TD = x_TD if residual_TD is None else x_TD + residual_TD
    normed_TD = F.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    codes = quantize_rows_ref(normed_TD, pow2) if quantize else (None, None)
    return (normed_TD if rows else None, None if residual_TD is None else x_TD, *codes)


@triton.jit
def _strips(
    x_ptr, residual_ptr, first, stride_x, stride_residual, D, ADD: tl.constexpr, S: tl.constexpr, C: tl.constexpr
):
    """Strips from `first` on of this program's row, plus the residual where ADD: (float32 [S, C], their columns)."""
    row = tl.program_id(0).to(tl.int64)
    col_SC = (first + tl.arange(0, S))[:, None] * C + tl.arange(0, C)[None, :]
    x_SC = tl.load(x_ptr + row * stride_x + col_SC, mask=col_SC < D, other=0.0)
    if ADD:
        other_SC = tl.load(residual_ptr + row * stride_residual + col_SC, mask=col_SC < D, other=0.0)
        x_SC = (x_SC.to(tl.float32) + other_SC.to(tl.float32)).to(x_SC.dtype)
    return x_SC.to(tl.float32), col_SC


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [T, D], rows `stride_x` apart
    residual_ptr,  # [T, D], rows `stride_residual` apart, read only where ADD
    weight_ptr,  # [D]
    rows_ptr,  # [T, D] contiguous, written only where ROWS
    sum_ptr,  # [T, D] contiguous, written only where ADD
    q_ptr,  # [T, D] contiguous, written only where QUANTIZE
    scale_ptr,  # [T, B] contiguous, written only where QUANTIZE
    stride_x,
    stride_residual,
    D,
    B,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    WHOLE: tl.constexpr,  # a row has at most STRIPS strips
    E4M3_MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    POW2: tl.constexpr,
    PRE_ROUND: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if WHOLE:
        x_SC, col_SC = _strips(x_ptr, residual_ptr, 0, stride_x, stride_residual, D, ADD, STRIPS, BLOCK)
        squares_SC = x_SC * x_SC
    else:
        squares_SC = tl.zeros((STRIPS, BLOCK), tl.float32)
        for first in range(0, B, STRIPS):
            x_SC, col_SC = _strips(x_ptr, residual_ptr, first, stride_x, stride_residual, D, ADD, STRIPS, BLOCK)
            squares_SC += x_SC * x_SC
    factor = tl.rsqrt(tl.sum(tl.sum(squares_SC, 1), 0) / D + eps)
    for first in range(0, B, STRIPS):
        if not WHOLE:
            x_SC, col_SC = _strips(x_ptr, residual_ptr, first, stride_x, stride_residual, D, ADD, STRIPS, BLOCK)
        if ADD:
            tl.store(sum_ptr + row * D + col_SC, x_SC.to(sum_ptr.dtype.element_ty), mask=col_SC < D)
        weight_SC = tl.load(weight_ptr + col_SC, mask=col_SC < D, other=0.0).to(tl.float32)
        normed_SC = (x_SC * factor * weight_SC).to(x_ptr.dtype.element_ty)
        if ROWS:
            tl.store(rows_ptr + row * D + col_SC, normed_SC, mask=col_SC < D)
        if QUANTIZE:
            scaled_SC, scale_S = quantize_strips(normed_SC.to(tl.float32), E4M3_MAX, MIN_SCALE, POW2, PRE_ROUND)
            tl.store(q_ptr + row * D + col_SC, scaled_SC.to(q_ptr.dtype.element_ty), mask=col_SC < D)
            strip_S = first + tl.arange(0, STRIPS)
            tl.store(scale_ptr + row * B + strip_S, scale_S, mask=strip_S < B)


def rms_norm_triton(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    quantize: bool,
    rows: bool,
    pow2: bool,
) -> Outputs:
    """`rms_norm_ref` in one launch."""
    (tokens, size), blocks = x_TD.shape, -(-x_TD.shape[1] // BLOCK)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    if residual_TD is not None and residual_TD.stride(1) != 1:
        residual_TD = residual_TD.contiguous()
    shape, device = (tokens, size), x_TD.device
    rows_TD = torch.empty(shape, dtype=x_TD.dtype, device=device) if rows else None
    sum_TD = torch.empty(shape, dtype=x_TD.dtype, device=device) if residual_TD is not None else None
    q_TD = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) if quantize else None
    scale_TB = torch.empty((tokens, blocks), dtype=torch.float32, device=device) if quantize else None
    if x_TD.numel():
        rms_norm_kernel[(tokens,)](
            x_TD,
            x_TD if residual_TD is None else residual_TD,
            weight_D.contiguous(),
            *(x_TD if out is None else out for out in (rows_TD, sum_TD, q_TD, scale_TB)),
            x_TD.stride(0),
            0 if residual_TD is None else residual_TD.stride(0),
            size,
            blocks,
            eps,
            ADD=residual_TD is not None,
            ROWS=rows,
            QUANTIZE=quantize,
            **norm_options(size, pow2),
        )
    return rows_TD, sum_TD, q_TD, scale_TB


def norm_options(size: int, pow2: bool) -> dict[str, float | bool | int]:
    """The other compile-time arguments: strips and warps by D alone, so that a row's sum has one order."""
    blocks = -(-size // BLOCK)
    strips = min(next_power_of_2(blocks), WHOLE_STRIPS)
    warps = min(16, max(1, strips // 4))
    return quantize_options(pow2) | {"STRIPS": strips, "WHOLE": blocks <= strips, "num_warps": warps}


def _audit(size: int, add: bool, rows: bool, quantize: bool) -> KernelSpec:
    options = norm_options(size, pow2=False) | {"PRE_ROUND": False}
    warps = options.pop("num_warps")
    constexprs = {"ADD": add, "ROWS": rows, "QUANTIZE": quantize, "WHOLE": options.pop("WHOLE")} | options
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "rows_ptr", "sum_ptr"), "*bf16")
    sizes = dict.fromkeys(("stride_x", "stride_residual", "D", "B"), "i32") | {"eps": "fp32"}
    parts = [name for name, on in (("residual", add), ("norm", True), ("rows", rows), ("codes", quantize)) if on]
    return KernelSpec(
        name="rms_norm" + ("_quantize" if quantize else ""),
        kernel=rms_norm_kernel,
        config=f"bf16, D={size}, {' + '.join(parts)}",
        signature=pointers
        | {"q_ptr": "*fp8e4nv" if quantize else "*bf16", "scale_ptr": "*fp32" if quantize else "*bf16"}
        | sizes
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=int(warps),
        multiples=("stride_x", "stride_residual", "D"),
    )


AUDIT = [
    _audit(7168, add=True, rows=True, quantize=False),
    _audit(7168, add=True, rows=True, quantize=True),
    _audit(2048, add=True, rows=True, quantize=True),
    _audit(7168, add=False, rows=False, quantize=True),
    _audit(32768, add=True, rows=True, quantize=True),
]
