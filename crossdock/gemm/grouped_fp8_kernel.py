# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The grouped product of e4m3 rows and weights, with the scales folded in every 128 of K.

Hopper's tensor cores keep about 14 bits while they sum FP8 products, too few for K = 7168. So each block of 128 is
summed on its own, scaled, and added to a float32 total (DeepSeek-V3 technical report, section 3.3.2, "Increasing
Accumulation Precision"); a block is also exactly what shares a scale, so the fold costs one multiply-add an element.

    K:            | block 0 | block 1 | ...
    acc[m, n]  =    dot_0 * (x_scale[m, 0] * w_scale[n / 128, 0])  +  dot_1 * (...)  +  ...

Where rows and output columns have one scale each (ROW_WISE) the sum runs over the same blocks for the same reason:
dot_0 * x_scale[m] + dot_1 * x_scale[m] + ..., and at the end times w_scale[n]. The row's scale stands inside the loop
because a bare `acc += dot` is what the compiler turns back into one long sum in the tensor core.

Tiles and order as in `grouped_kernel`: a row's bits depend on no other row, and not on the tile. The multiply-add is
written as one instruction, so that no tile's compilation can split it.

Legend: R rows in group order, T rows in memory, L groups, N output columns, K inner size, B blocks of 128; M, N, K also
of one tile.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.gemm import configs
from crossdock.gemm.configs import Kind, Problem
from crossdock.gemm.grouped_kernel import is_aligned
from crossdock.gemm.product_specs import product_spec, tile_for
from crossdock.gemm.quantize_kernel import BLOCK, spread
from crossdock.gemm.tile_map import find_tile, map_options, rows_of, source_rows, spans, swizzle, tile_bound
from crossdock.linear import linear


def grouped_gemm_fp8_ref(
    q_TK: Tensor,
    scale_TB: Tensor,
    wq_LNK: Tensor,
    wscale_LBB: Tensor,
    ends_L: Tensor,
    out_dtype: torch.dtype,
    row_ids_R: Tensor | None = None,
    slab: int = 0,
) -> Tensor:
    """The specification, and the torch backend: dequantise one group after another, multiply in float32 -> [R, N].

    Scales [T, B] and [L, B, B] are per block, scales [T] and [L, N] per row and output column.
    """
    (rows, inner), columns = q_TK.shape, wq_LNK.shape[1]
    rows = rows if row_ids_R is None else row_ids_R.shape[0]
    out_RN = torch.empty((rows, columns), dtype=out_dtype, device=q_TK.device)
    for group, start, end in spans(ends_L, slab):
        scale = rows_of(scale_TB, start, end, row_ids_R)
        if wscale_LBB.dim() == 2:
            scale_MK, w_scale_NK = scale[:, None], wscale_LBB[group][:, None]
        else:
            scale_MK = spread(scale, inner, 1)
            w_scale_NK = spread(spread(wscale_LBB[group], columns, 0), inner, 1)
        x_MK = rows_of(q_TK, start, end, row_ids_R).float() * scale_MK
        out_RN[start:end] = linear(x_MK, wq_LNK[group].float() * w_scale_NK)
    return out_RN


@triton.jit
def block_scales(wscale_ptr, group, from_N, blocks_n, blocks_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers to the weights' scales of a tile for block 0 of K; block k's stand k further on.

    A tile of up to 128 columns has one. It is read as a vector [M, 1], so that it goes through the same pipeline as the
    rows' scales; a wider tile reads one for each column, [1, N].
    """
    group_ptr = wscale_ptr + group.to(tl.int64) * blocks_n * blocks_k
    if BLOCK_N <= 128:
        return group_ptr + (tl.min(from_N, 0) // 128 * blocks_k + tl.zeros((BLOCK_M,), tl.int64))[:, None]
    else:
        return group_ptr + (from_N // 128 * blocks_k)[None, :]


@triton.jit
def grouped_gemm_fp8_kernel(
    rows_ptr,  # [T, K] e4m3, rows `stride_r` apart
    scale_ptr,  # [T, B] float32 contiguous; [T] where ROW_WISE
    weights_ptr,  # [L, N, K] e4m3, groups `stride_l` apart, columns of the output `stride_n` apart
    wscale_ptr,  # [L, ceil(N / 128), B] float32 contiguous; [L, N] where ROW_WISE
    ends_ptr,  # [L] int32: ends, or counts where MASKED
    row_ids_ptr,  # [R] int32 or int64, read only where GATHER
    out_ptr,  # [R, N] contiguous
    tiles_m,
    L,
    N,
    K,
    slab,
    stride_r,
    stride_l,
    stride_n,
    ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N
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
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile_m, tile_n = swizzle(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    group, start, end = find_tile(ends_ptr, tile_m, L, BLOCK_M, L_POW2, slab, MASKED)
    if start >= end:
        return
    # Columns past the end read the last one again, which costs no mask; they are never stored.
    row_M = start + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    from_M = source_rows(row_ids_ptr, row_M, end, GATHER)
    from_N = (col_N if EVEN_N else tl.minimum(col_N, N - 1)).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K)
    x_ptrs = rows_ptr + from_M[:, None] * stride_r + k_K[None, :]
    w_ptrs = weights_ptr + group.to(tl.int64) * stride_l + from_N[None, :] * stride_n + k_K[:, None]
    if ALIGNED:
        x_ptrs = tl.multiple_of(x_ptrs, (16, 16))
        w_ptrs = tl.multiple_of(w_ptrs, (16, 16))
    if ROW_WISE:
        scale_MN = tl.load(scale_ptr + from_M)[:, None]
    else:
        xs_ptrs = (scale_ptr + from_M * blocks_k)[:, None]
        ws_ptrs = block_scales(wscale_ptr, group, from_N, tl.cdiv(N, 128), blocks_k, BLOCK_M, BLOCK_N)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, blocks_k):
        if EVEN_K:
            x_MK = tl.load(x_ptrs)
            w_KN = tl.load(w_ptrs)
        else:
            left = K - k * BLOCK_K
            x_MK = tl.load(x_ptrs, mask=k_K[None, :] < left, other=0.0)
            w_KN = tl.load(w_ptrs, mask=k_K[:, None] < left, other=0.0)
        if not ROW_WISE:
            scale_MN = tl.load(xs_ptrs + k) * tl.load(ws_ptrs + k)
        acc_MN = tl.fma(tl.dot(x_MK, w_KN), tl.broadcast_to(scale_MN, (BLOCK_M, BLOCK_N)), acc_MN)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if ROW_WISE:
        acc_MN *= tl.load(wscale_ptr + group.to(tl.int64) * N + from_N)[None, :]
    out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * N + col_N[None, :]
    tl.store(out_ptrs, acc_MN.to(out_ptr.dtype.element_ty), mask=(row_M < end)[:, None] & (col_N < N)[None, :])


def grouped_gemm_fp8_triton(
    q_TK: Tensor,
    scale_TB: Tensor,
    wq_LNK: Tensor,
    wscale_LBB: Tensor,
    ends_L: Tensor,
    out_dtype: torch.dtype,
    row_ids_R: Tensor | None = None,
    slab: int = 0,
) -> Tensor:
    """`grouped_gemm_fp8_ref` in one launch that never reads `ends_L` on the host."""
    groups, columns, inner = wq_LNK.shape
    rows, row_wise = q_TK.shape[0] if row_ids_R is None else row_ids_R.shape[0], wscale_LBB.dim() == 2
    out_RN = torch.empty((rows, columns), dtype=out_dtype, device=q_TK.device)
    if out_RN.numel() == 0:
        return out_RN
    q_TK = q_TK if q_TK.stride(1) == 1 else q_TK.contiguous()
    wq_LNK = wq_LNK if wq_LNK.stride(2) == 1 else wq_LNK.contiguous()
    kind: Kind = "fp8_row" if row_wise else "fp8_block"
    tile = configs.choose(Problem(kind, rows, groups, columns, inner), q_TK.device)
    tiles_m = tile_bound(rows, groups, tile.block_m, slab)
    strides = q_TK.stride(0), wq_LNK.stride(0), wq_LNK.stride(1)
    ends_L = ends_L.contiguous()
    grouped_gemm_fp8_kernel[(tiles_m * -(-columns // tile.block_n),)](
        q_TK,
        scale_TB.contiguous(),
        wq_LNK,
        wscale_LBB.contiguous(),
        ends_L,
        ends_L if row_ids_R is None else row_ids_R.contiguous(),
        out_RN,
        tiles_m,
        groups,
        columns,
        inner,
        slab,
        *strides,
        ALIGNED=is_aligned(q_TK, *strides) and is_aligned(wq_LNK),
        EVEN_N=columns % tile.block_n == 0,
        EVEN_K=inner % BLOCK == 0,
        ROW_WISE=row_wise,
        **map_options(groups, row_ids_R, slab),
        **tile.launch(),
    )
    return out_RN


def _audit(problem: Problem, layout: str = "ragged") -> KernelSpec:
    tile = tile_for(problem)
    even = {"EVEN_N": problem.columns % tile.block_n == 0, "EVEN_K": problem.inner % BLOCK == 0}
    pointers = {"rows_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "weights_ptr": "*fp8e4nv", "wscale_ptr": "*fp32"}
    return product_spec(
        "grouped_gemm_fp8" if problem.kind == "fp8_block" else "grouped_gemm_fp8_rowwise",
        grouped_gemm_fp8_kernel,
        problem,
        pointers | {"ends_ptr": "*i32", "row_ids_ptr": "*i32", "out_ptr": "*bf16"},
        ("tiles_m", "L", "N", "K", "slab", "stride_r", "stride_l", "stride_n"),
        {"ALIGNED": True} | even | {"ROW_WISE": problem.kind == "fp8_row"},
        layout,
    )


AUDIT = [
    _audit(Problem("fp8_block", 32 * 1024, 32, 4096, 7168)),
    _audit(Problem("fp8_block", 32 * 8, 32, 4096, 7168), "gather"),
    _audit(Problem("fp8_block", 32 * 8, 32, 4096, 7168), "masked"),
    _audit(Problem("fp8_row", 32 * 1024, 32, 4096, 7168)),
    _audit(Problem("fp8_row", 32 * 8, 32, 4096, 7168), "gather"),
]
