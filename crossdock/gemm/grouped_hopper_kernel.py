# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The grouped product of bf16 or fp16 rows and weights as Hopper runs it fast: bulk copies, and programs that stay.

Same sums in the same order as `grouped_kernel`, so the same bits; what differs is how operands travel:

- Weights, and rows that are not gathered, come through the bulk tensor copy (TMA): one thread asks for a whole tile, so
  no registers hold addresses and no instruction copies. Weights [L, N, K] are seen as [L * N, K]. A tile that reaches
  past its group, in rows or in columns, reads the next one's; that is computed and not stored. Past the end of a tensor
  the copy gives zeros.
- Gathered rows come by ordinary loads: Hopper's bulk copy cannot gather.
- Programs stay (`persistent_map`), and the loop over tiles is fused with that over K: the pipeline of loads runs on
  from one tile into the next.

Rejected: `warp_specialize=True`. For sm_90, Triton ignores it with 8 warps; with 4, Triton 3.7 fails to compile this
kernel, and 3.6 and 3.7 the one for FP8.

Legend: R rows in group order, T rows in memory (R without `row_ids`), L groups, N output columns, K inner size; M, N, K
also of one tile.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.gemm.configs import Problem
from crossdock.gemm.hopper_launch import hopper_spec, operands, tile_of
from crossdock.gemm.persistent_map import programs, scan_groups, tile_at
from crossdock.gemm.tile_map import map_options, source_rows, swizzle, tile_bound


@triton.jit
def load_rows(rows, from_M, start, k, K, stride_r, EVEN_K: tl.constexpr, GATHER: tl.constexpr, BLOCK_K: tl.constexpr):
    """Step k of a tile's rows [M, K]: from a descriptor, or where GATHER, from an address, rows `from_M`."""
    if GATHER:
        k_K = k * BLOCK_K + tl.arange(0, BLOCK_K)
        x_ptrs = tl.multiple_of(rows + from_M[:, None] * stride_r + k_K[None, :], (16, 16))
        x_MK = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=k_K[None, :] < K, other=0.0)
    else:
        x_MK = rows.load([start, k * BLOCK_K])
    return x_MK


@triton.jit
def grouped_gemm_hopper_kernel(
    rows,  # descriptor of [T, K] in boxes [BLOCK_M, BLOCK_K]; where GATHER the address, rows `stride_r` apart
    weights,  # descriptor of [L * N, K] in boxes [BLOCK_N, BLOCK_K]
    ends_ptr,  # [L] int32: ends, or counts where MASKED
    row_ids_ptr,  # [R] int32 or int64, read only where GATHER
    out_ptr,  # [R, N] contiguous
    L,
    N,
    K,
    slab,
    stride_r,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    WIDEN: tl.constexpr,  # the interpreter multiplies bf16's bit patterns, so it gets float32
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    L_POW2: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    start_L, end_L, through_L = scan_groups(ends_ptr, L, slab, BLOCK_M, L_POW2, MASKED)
    tiles_m = tl.max(through_L, 0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        group, start, end = tile_at(start_L, end_L, through_L, tile_m, BLOCK_M, L_POW2)
        row_M = start + tl.arange(0, BLOCK_M)
        col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        from_M = source_rows(row_ids_ptr, row_M, end, GATHER)
        first_n = group * N + tile_n * BLOCK_N
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x_MK = load_rows(rows, from_M, start, k, K, stride_r, EVEN_K, GATHER, BLOCK_K)
            w_NK = weights.load([first_n, k * BLOCK_K])
            if WIDEN:
                x_MK = x_MK.to(tl.float32)
                w_NK = w_NK.to(tl.float32)
            acc_MN = tl.dot(x_MK, w_NK.T, acc_MN, input_precision="ieee")
        out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * N + col_N[None, :]
        tl.store(out_ptrs, acc_MN.to(out_ptr.dtype.element_ty), mask=(row_M < end)[:, None] & (col_N < N)[None, :])


def grouped_gemm_hopper(
    rows_TK: Tensor,
    weights_LNK: Tensor,
    ends_L: Tensor,
    row_ids_R: Tensor | None = None,
    slab: int = 0,
) -> Tensor:
    """`grouped_kernel.grouped_gemm_ref` in one launch that never reads `ends_L`; for what `hopper.takes`."""
    groups, columns, inner = weights_LNK.shape
    rows = rows_TK.shape[0] if row_ids_R is None else row_ids_R.shape[0]
    out_RN = torch.empty((rows, columns), dtype=rows_TK.dtype, device=rows_TK.device)
    if out_RN.numel() == 0:
        return out_RN
    tile = tile_of(Problem("bf16", rows, groups, columns, inner), rows_TK.device)
    tiles = tile_bound(rows, groups, tile.block_m, slab) * -(-columns // tile.block_n)
    ends_L = ends_L.contiguous()
    grouped_gemm_hopper_kernel[(programs(tile, tiles, rows_TK.device),)](
        *operands(rows_TK, weights_LNK, tile, row_ids_R is not None),
        ends_L,
        ends_L if row_ids_R is None else row_ids_R.contiguous(),
        out_RN,
        groups,
        columns,
        inner,
        slab,
        rows_TK.stride(0),
        EVEN_K=inner % tile.block_k == 0,
        WIDEN=interpreting() and rows_TK.dtype == torch.bfloat16,
        **map_options(groups, row_ids_R, slab),
        **tile.launch(),
    )
    return out_RN


def _audit(problem: Problem, layout: str = "ragged") -> KernelSpec:
    pointers = {"ends_ptr": "*i32", "row_ids_ptr": "*i32", "out_ptr": "*bf16"}
    return hopper_spec(
        "grouped_gemm_hopper",
        grouped_gemm_hopper_kernel,
        problem,
        "bf16",
        pointers,
        ("L", "N", "K", "slab", "stride_r"),
        {"WIDEN": False},
        layout,
    )


AUDIT = [
    _audit(Problem("bf16", 32 * 1024, 32, 4096, 7168)),
    _audit(Problem("bf16", 32 * 8, 32, 4096, 7168)),
    _audit(Problem("bf16", 128 * 128, 128, 1536, 2048), "gather"),
    _audit(Problem("bf16", 128 * 128, 128, 1408, 2048), "gather"),
    _audit(Problem("bf16", 128 * 4, 128, 1536, 2048), "gather"),
    _audit(Problem("bf16", 32 * 64, 32, 7168, 2048), "masked"),
]
