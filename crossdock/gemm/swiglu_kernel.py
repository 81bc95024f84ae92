# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""SwiGLU on the device, alone and fused with the quantisation of what it gives.

Fused, the [R, F] product never reaches memory in bf16: 2 bytes read and 1 written a column in place of 2 + 2 + 2 + 1,
and one rounding less. Its maths is float32 in every dtype: exp in bf16 is good to two digits.

Legend: R rows, F inner size, B strips of 128 a row, S strips a program, C columns of a strip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.gemm.quantize_kernel import BLOCK, STRIPS, quantize_options, quantize_rows_ref, quantize_strips

COLUMNS = 1024  # of one program of the unfused kernel
ONE_THREAD = 32768  # elements from which torch divides an elementwise operation between threads (its GRAIN_SIZE)


def swiglu_ref(gate_up_R2F: Tensor) -> Tensor:
    """The specification, and the torch backend: [R, 2F] -> silu(gate) * up [R, F] in the same dtype.

    On a CPU, torch computes exp of whole vectors and of what is left at the end of a row in two ways that differ in the
    last bit, and where several threads share a tensor, their borders make such ends in the middle of rows. So many
    rows go in portions that torch gives to one thread each, and a row's bits depend on that row only. A portion also
    stays in the cache: 16384 rows of 2 x 384 take a fifth of the time.
    """
    gate_up_R2F = gate_up_R2F if gate_up_R2F.stride(1) == 1 else gate_up_R2F.contiguous()
    rows, inner = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    if gate_up_R2F.device.type != "cpu" or rows * inner < ONE_THREAD:
        return _silu_times(gate_up_R2F)
    portions = torch.split(gate_up_R2F, max(1, (ONE_THREAD - 1) // inner))
    return torch.cat([_silu_times(portion_R2F) for portion_R2F in portions])


def _silu_times(gate_up_R2F: Tensor) -> Tensor:
    wide = torch.float64 if gate_up_R2F.dtype == torch.float64 else torch.float32
    gate_RF, up_RF = gate_up_R2F.to(wide).chunk(2, dim=-1)
    return (F.silu(gate_RF) * up_RF).to(gate_up_R2F.dtype)


def swiglu_quantize_ref(gate_up_R2F: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """The same, quantised per strip from the unrounded float32 product: -> codes [R, F] e4m3, scales [R, B]."""
    return quantize_rows_ref(swiglu_ref(gate_up_R2F.float()), pow2)


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in float32; exp overflows to infinity for gate < -88, which gives the right limit, -0."""
    gate = gate.to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # [R, 2F], rows `stride` apart
    out_ptr,  # [R, F] contiguous
    stride,
    F,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(gate_up_ptr + row * stride + col, mask=col < F, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + F + col, mask=col < F, other=0.0)
    tl.store(out_ptr + row * F + col, silu_times(gate, up).to(out_ptr.dtype.element_ty), mask=col < F)


@triton.jit
def swiglu_quantize_kernel(
    gate_up_ptr,  # [R, 2F], rows `stride` apart
    q_ptr,  # [R, F] contiguous
    scale_ptr,  # [R, B] contiguous
    stride,
    F,
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
    gate_SC = tl.load(gate_up_ptr + row * stride + col_SC, mask=col_SC < F, other=0.0)
    up_SC = tl.load(gate_up_ptr + row * stride + F + col_SC, mask=col_SC < F, other=0.0)
    scaled_SC, scale_S = quantize_strips(silu_times(gate_SC, up_SC), E4M3_MAX, MIN_SCALE, POW2, PRE_ROUND)
    tl.store(q_ptr + row * F + col_SC, scaled_SC.to(q_ptr.dtype.element_ty), mask=col_SC < F)
    tl.store(scale_ptr + row * B + strip_S, scale_S, mask=strip_S < B)


def swiglu_triton(gate_up_R2F: Tensor) -> Tensor:
    """`swiglu_ref` in one launch."""
    rows, inner = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    gate_up_R2F = gate_up_R2F if gate_up_R2F.stride(1) == 1 else gate_up_R2F.contiguous()
    out_RF = torch.empty((rows, inner), dtype=gate_up_R2F.dtype, device=gate_up_R2F.device)
    if out_RF.numel():
        swiglu_kernel[(rows, -(-inner // COLUMNS))](gate_up_R2F, out_RF, gate_up_R2F.stride(0), inner, COLUMNS=COLUMNS)
    return out_RF


def swiglu_quantize_triton(gate_up_R2F: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """`swiglu_quantize_ref` in one launch."""
    rows, inner = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    blocks = -(-inner // BLOCK)
    gate_up_R2F = gate_up_R2F if gate_up_R2F.stride(1) == 1 else gate_up_R2F.contiguous()
    q_RF = torch.empty((rows, inner), dtype=torch.float8_e4m3fn, device=gate_up_R2F.device)
    scale_RB = torch.empty((rows, blocks), dtype=torch.float32, device=gate_up_R2F.device)
    if q_RF.numel():
        swiglu_quantize_kernel[(rows, -(-blocks // STRIPS))](
            gate_up_R2F, q_RF, scale_RB, gate_up_R2F.stride(0), inner, blocks, **quantize_options(pow2)
        )
    return q_RF, scale_RB


_QUANTIZE = quantize_options(pow2=False) | {"PRE_ROUND": False}
_SIZES = {"stride": "i32", "F": "i32"}

AUDIT = [
    KernelSpec(
        name="swiglu",
        kernel=swiglu_kernel,
        config=f"bf16, {COLUMNS} columns",
        signature={"gate_up_ptr": "*bf16", "out_ptr": "*bf16"} | _SIZES | {"COLUMNS": "constexpr"},
        constexprs={"COLUMNS": COLUMNS},
    ),
    KernelSpec(
        name="swiglu_quantize",
        kernel=swiglu_quantize_kernel,
        config=f"bf16, {STRIPS}x{BLOCK} strips",
        signature={"gate_up_ptr": "*bf16", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
        | _SIZES
        | {"B": "i32"}
        | dict.fromkeys(_QUANTIZE, "constexpr"),
        constexprs=_QUANTIZE,
    ),
]
