# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The grouped FP8 product as Hopper runs it fast: `grouped_fp8_kernel`'s sums, done as in `grouped_hopper_kernel`.

A block of 128 along K is one fresh accumulation and one fold. The scales are asked for before the product of their
block is begun and wanted after its end, so their way from the cache is hidden behind it. They may have any strides:
with neighbouring rows next to each other in memory ([T, B] seen through a transpose) a warp reads fewer lines.

What else was tried, by registers alone (sm_90, Triton 3.6 and 3.7): tiles of 128 x 256 in two waves, which read
operands a quarter less often, spill some 25 registers, as the compiler keeps both waves' products at once.

Legend: R rows in group order, T rows in memory, L groups, N output columns, K inner size, B blocks of 128; M, N, K also
of one tile.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.gemm.configs import Kind, Problem
from crossdock.gemm.grouped_hopper_kernel import load_rows
from crossdock.gemm.hopper_launch import hopper_spec, operands, tile_of
from crossdock.gemm.persistent_map import programs, scan_groups, tile_at
from crossdock.gemm.tile_map import map_options, source_rows, swizzle, tile_bound


@triton.jit
def grouped_gemm_fp8_hopper_kernel(
    rows,  # descriptor of [T, K] e4m3 in boxes [BLOCK_M, BLOCK_K]; where GATHER the address, rows `stride_r` apart
    weights,  # descriptor of [L * N, K] e4m3 in boxes [BLOCK_N, BLOCK_K]
    scale_ptr,  # [T, B] float32, `stride_sr` and `stride_sk` apart; [T] where ROW_WISE
    wscale_ptr,  # [L, ceil(N / 128), B] float32 contiguous; [L, N] where ROW_WISE
    ends_ptr,  # [L] int32: ends, or counts where MASKED
    row_ids_ptr,  # [R] int32 or int64, read only where GATHER
    out_ptr,  # [R, N] contiguous
    L,
    N,
    K,
    slab,
    stride_r,
    stride_sr,
    stride_sk,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    ROW_WISE: tl.constexpr,
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    L_POW2: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # 128: what shares a scale
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    start_L, end_L, through_L = scan_groups(ends_ptr, L, slab, BLOCK_M, L_POW2, MASKED)
    tiles_m = tl.max(through_L, 0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        group, start, end = tile_at(start_L, end_L, through_L, tile_m, BLOCK_M, L_POW2)
        row_M = start + tl.arange(0, BLOCK_M)
        col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        from_M = source_rows(row_ids_ptr, row_M, end, GATHER)
        first_n = group * N + tile_n * BLOCK_N
        xs_ptrs = scale_ptr + from_M * stride_sr
        if ROW_WISE:
            scale_MN = tl.load(xs_ptrs)[:, None]
        elif BLOCK_N <= 128:  # the weights' scale is one number
            ws_ptrs = wscale_ptr + (group.to(tl.int64) * tl.cdiv(N, 128) + tile_n * BLOCK_N // 128) * blocks_k
        else:
            block_N = tl.minimum(col_N, N - 1) // 128
            ws_ptrs = wscale_ptr + ((group.to(tl.int64) * tl.cdiv(N, 128) + block_N) * blocks_k)[None, :]
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, blocks_k):
            x_MK = load_rows(rows, from_M, start, k, K, stride_r, EVEN_K, GATHER, BLOCK_K)
            w_NK = weights.load([first_n, k * BLOCK_K])
            if not ROW_WISE:
                scale_MN = tl.load(xs_ptrs + k * stride_sk)[:, None] * tl.load(ws_ptrs + k)
            acc_MN = tl.fma(tl.dot(x_MK, w_NK.T), tl.broadcast_to(scale_MN, (BLOCK_M, BLOCK_N)), acc_MN)
        if ROW_WISE:
            here_N = tl.minimum(col_N, N - 1)
            acc_MN *= tl.load(wscale_ptr + group.to(tl.int64) * N + here_N)[None, :]
        out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * N + col_N[None, :]
        tl.store(out_ptrs, acc_MN.to(out_ptr.dtype.element_ty), mask=(row_M < end)[:, None] & (col_N < N)[None, :])


def grouped_gemm_fp8_hopper(
    q_TK: Tensor,
    scale_TB: Tensor,
    wq_LNK: Tensor,
    wscale_LBB: Tensor,
    ends_L: Tensor,
    out_dtype: torch.dtype,
    row_ids_R: Tensor | None = None,
    slab: int = 0,
) -> Tensor:
    """`grouped_fp8_kernel.grouped_gemm_fp8_ref` in one launch that never reads `ends_L`; for what `hopper.takes`."""
    groups, columns, inner = wq_LNK.shape
    rows, row_wise = q_TK.shape[0] if row_ids_R is None else row_ids_R.shape[0], wscale_LBB.dim() == 2
    out_RN = torch.empty((rows, columns), dtype=out_dtype, device=q_TK.device)
    if out_RN.numel() == 0:
        return out_RN
    kind: Kind = "fp8_row" if row_wise else "fp8_block"
    tile = tile_of(Problem(kind, rows, groups, columns, inner), q_TK.device, out_dtype.itemsize)
    tiles = tile_bound(rows, groups, tile.block_m, slab) * -(-columns // tile.block_n)
    ends_L = ends_L.contiguous()
    grouped_gemm_fp8_hopper_kernel[(programs(tile, tiles, q_TK.device),)](
        *operands(q_TK, wq_LNK, tile, row_ids_R is not None),
        scale_TB,
        wscale_LBB.contiguous(),
        ends_L,
        ends_L if row_ids_R is None else row_ids_R.contiguous(),
        out_RN,
        groups,
        columns,
        inner,
        slab,
        q_TK.stride(0),
        scale_TB.stride(0),
        0 if row_wise else scale_TB.stride(1),
        EVEN_K=inner % tile.block_k == 0,
        ROW_WISE=row_wise,
        **map_options(groups, row_ids_R, slab),
        **tile.launch(),
    )
    return out_RN


def _audit(problem: Problem, layout: str = "ragged") -> KernelSpec:
    row_wise = problem.kind == "fp8_row"
    pointers = {"scale_ptr": "*fp32", "wscale_ptr": "*fp32", "ends_ptr": "*i32", "row_ids_ptr": "*i32"}
    sizes = ("L", "N", "K", "slab", "stride_r", "stride_sr", "stride_sk")
    return hopper_spec(
        "grouped_gemm_fp8_rowwise_hopper" if row_wise else "grouped_gemm_fp8_hopper",
        grouped_gemm_fp8_hopper_kernel,
        problem,
        "fp8e4nv",
        pointers | {"out_ptr": "*bf16"},
        sizes,
        {"ROW_WISE": row_wise},
        layout,
    )


AUDIT = [
    _audit(Problem("fp8_block", 32 * 1024, 32, 4096, 7168)),
    _audit(Problem("fp8_block", 32 * 8, 32, 4096, 7168)),
    _audit(Problem("fp8_block", 128 * 128, 128, 1536, 2048), "gather"),
    _audit(Problem("fp8_block", 128 * 4, 128, 1536, 2048), "gather"),
    _audit(Problem("fp8_block", 32 * 64, 32, 7168, 2048), "masked"),
    _audit(Problem("fp8_block", 384 * 65, 384, 7168, 2048)),
    _audit(Problem("fp8_row", 32 * 1024, 32, 4096, 7168)),
    _audit(Problem("fp8_row", 32 * 8, 32, 4096, 7168)),
]
