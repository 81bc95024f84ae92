# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""An expert's first half in one launch: the gate and up products and SwiGLU between them, float rows and weights.

A program computes a tile of gate columns and the tile of up columns that belongs to it from the same rows, so what it
stores is [R, F] and the [R, 2F] between product and activation never reaches memory:

    gate_up [2F, D]    | gate: F rows | up: F rows |        tile n multiplies rows n of both halves
    out     [R, F]     silu(gate) * up

Gate and up are rounded to the output dtype before SwiGLU, as memory between two kernels would have rounded them: fused
and unfused results are equal to the bit, so that training, which needs gate and up in memory, computes the same.

Legend: R rows in group order, T rows in memory, L groups (expert slots on this rank), F inner size of an expert, D
hidden size, M, N, K of one tile: rows, gate columns, hidden.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.gemm import configs
from crossdock.gemm.configs import Kind, Problem
from crossdock.gemm.grouped_kernel import grouped_gemm_ref, is_aligned
from crossdock.gemm.product_specs import product_spec, tile_for
from crossdock.gemm.swiglu_kernel import silu_times, swiglu_ref
from crossdock.gemm.tile_map import find_tile, map_options, source_rows, swizzle, tile_bound


def grouped_swiglu_ref(
    rows_TD: Tensor, gate_up_L2FD: Tensor, ends_L: Tensor, row_ids_R: Tensor | None = None, slab: int = 0
) -> Tensor:
    """The specification: the product with gate_up, rounded, then SwiGLU -> [R, F]."""
    return swiglu_ref(grouped_gemm_ref(rows_TD, gate_up_L2FD, ends_L, row_ids_R, slab))


@triton.jit
def grouped_swiglu_kernel(
    rows_ptr,  # [T, D], rows `stride_r` apart
    weights_ptr,  # [L, 2F, D], groups `stride_l` apart, rows `stride_w` apart
    ends_ptr,  # [L] int32: ends, or counts where MASKED
    row_ids_ptr,  # [R] int32 or int64, read only where GATHER
    out_ptr,  # [R, F] contiguous
    tiles_m,
    L,
    F,
    D,
    slab,
    stride_r,
    stride_l,
    stride_w,
    ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    EVEN_N: tl.constexpr,  # F is a multiple of BLOCK_N
    EVEN_K: tl.constexpr,  # D is a multiple of BLOCK_K
    WIDEN: tl.constexpr,  # the interpreter multiplies bf16's bit patterns, so it gets float32
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    L_POW2: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = swizzle(tl.program_id(0), tiles_m, tl.cdiv(F, BLOCK_N), GROUP_M)
    group, start, end = find_tile(ends_ptr, tile_m, L, BLOCK_M, L_POW2, slab, MASKED)
    if start >= end:
        return
    # Columns past the end read the last one again, which costs no mask; they are never stored.
    row_M = start + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    from_M = source_rows(row_ids_ptr, row_M, end, GATHER)
    from_N = (col_N if EVEN_N else tl.minimum(col_N, F - 1)).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K)
    x_ptrs = rows_ptr + from_M[:, None] * stride_r + k_K[None, :]
    gate_ptrs = weights_ptr + group.to(tl.int64) * stride_l + from_N[None, :] * stride_w + k_K[:, None]
    up_ptrs = gate_ptrs + tl.full((), F, tl.int64) * stride_w
    if ALIGNED:
        x_ptrs = tl.multiple_of(x_ptrs, (16, 16))
        gate_ptrs = tl.multiple_of(gate_ptrs, (16, 16))
        up_ptrs = tl.multiple_of(up_ptrs, (16, 16))
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(D, BLOCK_K)):
        if EVEN_K:
            x_MK = tl.load(x_ptrs)
            gate_KN = tl.load(gate_ptrs)
            up_KN = tl.load(up_ptrs)
        else:
            left = D - k * BLOCK_K
            x_MK = tl.load(x_ptrs, mask=k_K[None, :] < left, other=0.0)
            gate_KN = tl.load(gate_ptrs, mask=k_K[:, None] < left, other=0.0)
            up_KN = tl.load(up_ptrs, mask=k_K[:, None] < left, other=0.0)
        if WIDEN:
            x_MK = x_MK.to(tl.float32)
            gate_KN = gate_KN.to(tl.float32)
            up_KN = up_KN.to(tl.float32)
        gate_MN = tl.dot(x_MK, gate_KN, gate_MN, input_precision="ieee")
        up_MN = tl.dot(x_MK, up_KN, up_MN, input_precision="ieee")
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out_MN = silu_times(gate_MN.to(dtype), up_MN.to(dtype)).to(dtype)
    out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * F + col_N[None, :]
    tl.store(out_ptrs, out_MN, mask=(row_M < end)[:, None] & (col_N < F)[None, :])


def grouped_swiglu_triton(
    rows_TD: Tensor, gate_up_L2FD: Tensor, ends_L: Tensor, row_ids_R: Tensor | None = None, slab: int = 0
) -> Tensor:
    """`grouped_swiglu_ref` in one launch that never reads `ends_L` on the host; weights have unit stride along D."""
    groups, two_f, hidden = gate_up_L2FD.shape
    rows, inner = rows_TD.shape[0] if row_ids_R is None else row_ids_R.shape[0], two_f // 2
    out_RF = torch.empty((rows, inner), dtype=rows_TD.dtype, device=rows_TD.device)
    if out_RF.numel() == 0:
        return out_RF
    rows_TD = rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()
    kind: Kind = "fp32_swiglu" if rows_TD.dtype == torch.float32 else "bf16_swiglu"
    tile = configs.choose(Problem(kind, rows, groups, inner, hidden), rows_TD.device)
    tiles_m = tile_bound(rows, groups, tile.block_m, slab)
    strides = rows_TD.stride(0), gate_up_L2FD.stride(0), gate_up_L2FD.stride(1)
    ends_L = ends_L.contiguous()
    grouped_swiglu_kernel[(tiles_m * -(-inner // tile.block_n),)](
        rows_TD,
        gate_up_L2FD,
        ends_L,
        ends_L if row_ids_R is None else row_ids_R.contiguous(),
        out_RF,
        tiles_m,
        groups,
        inner,
        hidden,
        slab,
        *strides,
        ALIGNED=is_aligned(rows_TD, *strides) and is_aligned(gate_up_L2FD),
        EVEN_N=inner % tile.block_n == 0,
        EVEN_K=hidden % tile.block_k == 0,
        WIDEN=interpreting() and rows_TD.dtype == torch.bfloat16,
        **map_options(groups, row_ids_R, slab),
        **tile.launch(),
    )
    return out_RF


def _audit(problem: Problem, layout: str = "ragged") -> KernelSpec:
    tile, element = tile_for(problem), problem.kind.removesuffix("_swiglu")
    even = {"EVEN_N": problem.columns % tile.block_n == 0, "EVEN_K": problem.inner % tile.block_k == 0}
    pointers = {"rows_ptr": element, "weights_ptr": element, "ends_ptr": "i32", "row_ids_ptr": "i32"}
    return product_spec(
        "grouped_swiglu",
        grouped_swiglu_kernel,
        problem,
        {name: f"*{kind}" for name, kind in (pointers | {"out_ptr": element}).items()},
        ("tiles_m", "L", "F", "D", "slab", "stride_r", "stride_l", "stride_w"),
        {"ALIGNED": True} | even | {"WIDEN": False},
        layout,
    )


AUDIT = [
    _audit(Problem("bf16_swiglu", 32 * 1024, 32, 2048, 7168)),
    _audit(Problem("bf16_swiglu", 128 * 4, 128, 768, 2048), "gather"),
    _audit(Problem("bf16_swiglu", 8, 1, 2048, 7168), "masked"),
    _audit(Problem("fp32_swiglu", 128 * 4, 128, 768, 2048), "gather"),
]
