# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""An expert's first half in FP8 in one launch: gate and up products, SwiGLU, and the quantisation of what it gives.

As `grouped_swiglu_kernel`, with the scales folded in as in `grouped_fp8_kernel`. A tile has 128 gate columns, which is
the strip that shares a scale, so a program knows the largest value of each of its strips and stores codes and scales
at once: the [R, 2F] of gate and up never reaches memory, and 1 byte a column does in place of 2 x 2 + 2 x 2 + 1.

Quantised per 128 and not per 64, which a narrower tile would allow: the product that follows folds one scale every 128
of K. Gate and up are rounded to `out_dtype` before SwiGLU, so that codes and scales are those of the two separate
kernels to the bit.

Legend: R rows in group order, T rows in memory, L groups (expert slots on this rank), F inner size of an expert, D
hidden size, B blocks of 128, M, N, K of one tile: rows, gate columns, hidden.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.gemm import configs
from crossdock.gemm.configs import Problem
from crossdock.gemm.grouped_fp8_kernel import grouped_gemm_fp8_ref
from crossdock.gemm.grouped_kernel import is_aligned
from crossdock.gemm.product_specs import product_spec
from crossdock.gemm.quantize_kernel import BLOCK, E4M3_MAX, MIN_SCALE, quantize_strips
from crossdock.gemm.swiglu_kernel import silu_times, swiglu_quantize_ref
from crossdock.gemm.tile_map import find_tile, map_options, source_rows, swizzle, tile_bound


def grouped_swiglu_fp8_ref(
    q_TD: Tensor,
    scale_TB: Tensor,
    wq_L2FD: Tensor,
    wscale_LBB: Tensor,
    ends_L: Tensor,
    pow2: bool,
    out_dtype: torch.dtype,
    row_ids_R: Tensor | None = None,
    slab: int = 0,
) -> tuple[Tensor, Tensor]:
    """The specification, and the torch backend: product, rounded; SwiGLU -> codes [R, F], scales [R, B]."""
    gate_up_R2F = grouped_gemm_fp8_ref(q_TD, scale_TB, wq_L2FD, wscale_LBB, ends_L, out_dtype, row_ids_R, slab)
    return swiglu_quantize_ref(gate_up_R2F, pow2)


@triton.jit
def grouped_swiglu_fp8_kernel(
    rows_ptr,  # [T, D] e4m3, rows `stride_r` apart
    scale_ptr,  # [T, D / 128] float32 contiguous
    weights_ptr,  # [L, 2F, D] e4m3, groups `stride_l` apart, rows `stride_w` apart
    wscale_ptr,  # [L, 2F / 128, D / 128] float32 contiguous
    ends_ptr,  # [L] int32: ends, or counts where MASKED
    row_ids_ptr,  # [R] int32 or int64, read only where GATHER
    q_ptr,  # [R, F] e4m3 contiguous
    out_scale_ptr,  # [R, F / 128] float32 contiguous
    tiles_m,
    L,
    F,  # a multiple of 128
    D,
    slab,
    stride_r,
    stride_l,
    stride_w,
    ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    EVEN_K: tl.constexpr,  # D is a multiple of BLOCK_K
    BETWEEN: tl.constexpr,  # the dtype that gate and up are rounded to
    E4M3_MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    POW2: tl.constexpr,
    PRE_ROUND: tl.constexpr,
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    L_POW2: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 128, as is BLOCK_K: what shares a scale
    BLOCK_K: tl.constexpr,
):
    tiles_n = F // BLOCK_N
    blocks_k = tl.cdiv(D, BLOCK_K)
    tile_m, tile_n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    group, start, end = find_tile(ends_ptr, tile_m, L, BLOCK_M, L_POW2, slab, MASKED)
    if start >= end:
        return
    row_M = start + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    from_M = source_rows(row_ids_ptr, row_M, end, GATHER)
    k_K = tl.arange(0, BLOCK_K)
    x_ptrs = rows_ptr + from_M[:, None] * stride_r + k_K[None, :]
    gate_ptrs = weights_ptr + group.to(tl.int64) * stride_l + col_N.to(tl.int64)[None, :] * stride_w + k_K[:, None]
    up_ptrs = gate_ptrs + tl.full((), F, tl.int64) * stride_w
    if ALIGNED:
        x_ptrs = tl.multiple_of(x_ptrs, (16, 16))
        gate_ptrs = tl.multiple_of(gate_ptrs, (16, 16))
        up_ptrs = tl.multiple_of(up_ptrs, (16, 16))
    xs_ptrs = scale_ptr + from_M * blocks_k
    # The weights' scales are one number each, read as vectors of M: they go through the same pipeline as the rows'.
    gs_ptrs = wscale_ptr + (group.to(tl.int64) * 2 * tiles_n + tile_n) * blocks_k + tl.zeros((BLOCK_M,), tl.int64)
    us_ptrs = gs_ptrs + tiles_n * blocks_k
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, blocks_k):
        if EVEN_K:
            x_MK = tl.load(x_ptrs)
            gate_KN = tl.load(gate_ptrs)
            up_KN = tl.load(up_ptrs)
        else:
            left = D - k * BLOCK_K
            x_MK = tl.load(x_ptrs, mask=k_K[None, :] < left, other=0.0)
            gate_KN = tl.load(gate_ptrs, mask=k_K[:, None] < left, other=0.0)
            up_KN = tl.load(up_ptrs, mask=k_K[:, None] < left, other=0.0)
        x_scale_M = tl.load(xs_ptrs + k)
        gate_scale_M = x_scale_M * tl.load(gs_ptrs + k)
        up_scale_M = x_scale_M * tl.load(us_ptrs + k)
        gate_MN = tl.fma(tl.dot(x_MK, gate_KN), tl.broadcast_to(gate_scale_M[:, None], (BLOCK_M, BLOCK_N)), gate_MN)
        up_MN = tl.fma(tl.dot(x_MK, up_KN), tl.broadcast_to(up_scale_M[:, None], (BLOCK_M, BLOCK_N)), up_MN)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    product_MN = silu_times(gate_MN.to(BETWEEN), up_MN.to(BETWEEN))
    scaled_MN, out_scale_M = quantize_strips(product_MN, E4M3_MAX, MIN_SCALE, POW2, PRE_ROUND)
    out_M = row_M.to(tl.int64)
    here_M = row_M < end
    q_ptrs = q_ptr + out_M[:, None] * F + col_N[None, :]
    tl.store(q_ptrs, scaled_MN.to(q_ptr.dtype.element_ty), mask=here_M[:, None])
    tl.store(out_scale_ptr + out_M * tiles_n + tile_n, out_scale_M, mask=here_M)


def grouped_swiglu_fp8_triton(
    q_TD: Tensor,
    scale_TB: Tensor,
    wq_L2FD: Tensor,
    wscale_LBB: Tensor,
    ends_L: Tensor,
    pow2: bool,
    out_dtype: torch.dtype,
    row_ids_R: Tensor | None = None,
    slab: int = 0,
) -> tuple[Tensor, Tensor]:
    """`grouped_swiglu_fp8_ref` in one launch that never reads `ends_L` on the host; F must be a multiple of 128."""
    groups, two_f, hidden = wq_L2FD.shape
    rows, inner = q_TD.shape[0] if row_ids_R is None else row_ids_R.shape[0], two_f // 2
    q_RF = torch.empty((rows, inner), dtype=torch.float8_e4m3fn, device=q_TD.device)
    scale_RB = torch.empty((rows, inner // BLOCK), dtype=torch.float32, device=q_TD.device)
    if q_RF.numel() == 0:
        return q_RF, scale_RB
    q_TD = q_TD if q_TD.stride(1) == 1 else q_TD.contiguous()
    wq_L2FD = wq_L2FD if wq_L2FD.stride(2) == 1 else wq_L2FD.contiguous()
    tile = configs.choose(Problem("fp8_block_swiglu", rows, groups, inner, hidden), q_TD.device)
    assert tile.block_n == tile.block_k == BLOCK
    tiles_m = tile_bound(rows, groups, tile.block_m, slab)
    strides = q_TD.stride(0), wq_L2FD.stride(0), wq_L2FD.stride(1)
    ends_L = ends_L.contiguous()
    grouped_swiglu_fp8_kernel[(tiles_m * (inner // BLOCK),)](
        q_TD,
        scale_TB.contiguous(),
        wq_L2FD,
        wscale_LBB.contiguous(),
        ends_L,
        ends_L if row_ids_R is None else row_ids_R.contiguous(),
        q_RF,
        scale_RB,
        tiles_m,
        groups,
        inner,
        hidden,
        slab,
        *strides,
        ALIGNED=is_aligned(q_TD, *strides) and is_aligned(wq_L2FD),
        EVEN_K=hidden % BLOCK == 0,
        **epilogue_options(out_dtype, pow2, interpreting()),
        **map_options(groups, row_ids_R, slab),
        **tile.launch(),
    )
    return q_RF, scale_RB


def epilogue_options(out_dtype: torch.dtype, pow2: bool, pre_round: bool) -> dict[str, object]:
    """The compile-time arguments of what follows the products."""
    between = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[out_dtype]
    return {
        "BETWEEN": between,
        "E4M3_MAX": E4M3_MAX,
        "MIN_SCALE": MIN_SCALE,
        "POW2": pow2,
        "PRE_ROUND": pre_round,
    }


def _audit(problem: Problem, layout: str = "ragged", pow2: bool = False) -> KernelSpec:
    pointers = {"rows_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "weights_ptr": "*fp8e4nv", "wscale_ptr": "*fp32"}
    pointers |= {"ends_ptr": "*i32", "row_ids_ptr": "*i32", "q_ptr": "*fp8e4nv", "out_scale_ptr": "*fp32"}
    return product_spec(
        "grouped_swiglu_fp8" + ("_pow2" if pow2 else ""),
        grouped_swiglu_fp8_kernel,
        problem,
        pointers,
        ("tiles_m", "L", "F", "D", "slab", "stride_r", "stride_l", "stride_w"),
        {"ALIGNED": True, "EVEN_K": problem.inner % BLOCK == 0} | epilogue_options(torch.bfloat16, pow2, False),
        layout,
    )


AUDIT = [
    _audit(Problem("fp8_block_swiglu", 32 * 1024, 32, 2048, 7168)),
    _audit(Problem("fp8_block_swiglu", 128 * 4, 128, 768, 2048), "gather"),
    _audit(Problem("fp8_block_swiglu", 8, 1, 2048, 7168), "masked"),
    _audit(Problem("fp8_block_swiglu", 128 * 4, 128, 768, 2048), "gather", pow2=True),
]
