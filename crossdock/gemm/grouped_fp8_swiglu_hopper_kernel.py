# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""An expert's first half in FP8 in one launch, in the form that Hopper runs fast.

Sums and what follows them are those of `grouped_fp8_swiglu_kernel`, done as in `grouped_hopper_kernel`; gate and up
columns of a tile are two boxes of one descriptor. Two totals and two fresh products leave no room for more than 64 rows
a tile.

Legend: R rows in group order, T rows in memory, L groups (expert slots on this rank), F inner size of an expert, D
hidden size, B blocks of 128, M, N, K of one tile: rows, gate columns, hidden.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.gemm.configs import Problem
from crossdock.gemm.grouped_fp8_swiglu_kernel import epilogue_options
from crossdock.gemm.grouped_hopper_kernel import load_rows
from crossdock.gemm.hopper_launch import hopper_spec, operands, tile_of
from crossdock.gemm.persistent_map import programs, scan_groups, tile_at
from crossdock.gemm.quantize_kernel import BLOCK, quantize_strips
from crossdock.gemm.swiglu_kernel import silu_times
from crossdock.gemm.tile_map import map_options, source_rows, swizzle, tile_bound


@triton.jit
def grouped_swiglu_fp8_hopper_kernel(
    rows,  # descriptor of [T, D] e4m3 in boxes [BLOCK_M, BLOCK_K]; where GATHER the address, rows `stride_r` apart
    weights,  # descriptor of [L * 2F, D] e4m3 in boxes [BLOCK_N, BLOCK_K]
    scale_ptr,  # [T, D / 128] float32, `stride_sr` and `stride_sk` apart
    wscale_ptr,  # [L, 2F / 128, D / 128] float32 contiguous
    ends_ptr,  # [L] int32: ends, or counts where MASKED
    row_ids_ptr,  # [R] int32 or int64, read only where GATHER
    q_ptr,  # [R, F] e4m3 contiguous
    out_scale_ptr,  # [R, F / 128] float32 contiguous
    L,
    F,  # a multiple of 128
    D,
    slab,
    stride_r,
    stride_sr,
    stride_sk,
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
    start_L, end_L, through_L = scan_groups(ends_ptr, L, slab, BLOCK_M, L_POW2, MASKED)
    tiles_m = tl.max(through_L, 0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        group, start, end = tile_at(start_L, end_L, through_L, tile_m, BLOCK_M, L_POW2)
        row_M = start + tl.arange(0, BLOCK_M)
        from_M = source_rows(row_ids_ptr, row_M, end, GATHER)
        first_n = group * 2 * F + tile_n * BLOCK_N
        xs_ptrs = scale_ptr + from_M * stride_sr
        gs_ptr = wscale_ptr + (group.to(tl.int64) * 2 * tiles_n + tile_n) * blocks_k
        gate_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, blocks_k):
            x_MK = load_rows(rows, from_M, start, k, D, stride_r, EVEN_K, GATHER, BLOCK_K)
            gate_NK = weights.load([first_n, k * BLOCK_K])
            up_NK = weights.load([first_n + F, k * BLOCK_K])
            x_scale_M = tl.load(xs_ptrs + k * stride_sk)
            gate_scale_M = x_scale_M * tl.load(gs_ptr + k)
            up_scale_M = x_scale_M * tl.load(gs_ptr + tiles_n * blocks_k + k)
            gate_scale_MN = tl.broadcast_to(gate_scale_M[:, None], (BLOCK_M, BLOCK_N))
            up_scale_MN = tl.broadcast_to(up_scale_M[:, None], (BLOCK_M, BLOCK_N))
            gate_MN = tl.fma(tl.dot(x_MK, gate_NK.T), gate_scale_MN, gate_MN)
            up_MN = tl.fma(tl.dot(x_MK, up_NK.T), up_scale_MN, up_MN)
        product_MN = silu_times(gate_MN.to(BETWEEN), up_MN.to(BETWEEN))
        scaled_MN, out_scale_M = quantize_strips(product_MN, E4M3_MAX, MIN_SCALE, POW2, PRE_ROUND)
        out_M = row_M.to(tl.int64)
        here_M = row_M < end
        col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        q_ptrs = q_ptr + out_M[:, None] * F + col_N[None, :]
        tl.store(q_ptrs, scaled_MN.to(q_ptr.dtype.element_ty), mask=here_M[:, None])
        tl.store(out_scale_ptr + out_M * tiles_n + tile_n, out_scale_M, mask=here_M)


def grouped_swiglu_fp8_hopper(
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
    """`grouped_fp8_swiglu_kernel.grouped_swiglu_fp8_ref` in one launch that never reads `ends_L` on the host."""
    groups, two_f, hidden = wq_L2FD.shape
    rows, inner = q_TD.shape[0] if row_ids_R is None else row_ids_R.shape[0], two_f // 2
    q_RF = torch.empty((rows, inner), dtype=torch.float8_e4m3fn, device=q_TD.device)
    scale_RB = torch.empty((rows, inner // BLOCK), dtype=torch.float32, device=q_TD.device)
    if q_RF.numel() == 0:
        return q_RF, scale_RB
    tile = tile_of(Problem("fp8_block_swiglu", rows, groups, inner, hidden), q_TD.device, out_bytes=1)
    tiles = tile_bound(rows, groups, tile.block_m, slab) * (inner // BLOCK)
    ends_L = ends_L.contiguous()
    grouped_swiglu_fp8_hopper_kernel[(programs(tile, tiles, q_TD.device),)](
        *operands(q_TD, wq_L2FD, tile, row_ids_R is not None),
        scale_TB,
        wscale_LBB.contiguous(),
        ends_L,
        ends_L if row_ids_R is None else row_ids_R.contiguous(),
        q_RF,
        scale_RB,
        groups,
        inner,
        hidden,
        slab,
        q_TD.stride(0),
        scale_TB.stride(0),
        scale_TB.stride(1),
        EVEN_K=hidden % tile.block_k == 0,
        **epilogue_options(out_dtype, pow2, interpreting()),
        **map_options(groups, row_ids_R, slab),
        **tile.launch(),
    )
    return q_RF, scale_RB


def _audit(problem: Problem, layout: str = "ragged") -> KernelSpec:
    pointers = {"scale_ptr": "*fp32", "wscale_ptr": "*fp32", "ends_ptr": "*i32", "row_ids_ptr": "*i32"}
    return hopper_spec(
        "grouped_swiglu_fp8_hopper",
        grouped_swiglu_fp8_hopper_kernel,
        problem,
        "fp8e4nv",
        pointers | {"q_ptr": "*fp8e4nv", "out_scale_ptr": "*fp32"},
        ("L", "F", "D", "slab", "stride_r", "stride_sr", "stride_sk"),
        epilogue_options(torch.bfloat16, False, False),
        layout,
    )


AUDIT = [
    _audit(Problem("fp8_block_swiglu", 32 * 1024, 32, 2048, 7168)),
    _audit(Problem("fp8_block_swiglu", 32 * 8, 32, 2048, 7168)),
    _audit(Problem("fp8_block_swiglu", 128 * 4, 128, 768, 2048), "gather"),
    _audit(Problem("fp8_block_swiglu", 8, 1, 2048, 7168), "masked"),
]
