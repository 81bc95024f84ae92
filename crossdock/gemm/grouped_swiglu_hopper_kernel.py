# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""An expert's first half in one launch, in the form that Hopper runs fast.

Sums are those of `grouped_swiglu_kernel`, done as in `grouped_hopper_kernel`; gate and up columns of a tile are two
boxes of one descriptor, F rows of the weights apart.

Legend: R rows in group order, T rows in memory, L groups (expert slots on this rank), F inner size of an expert, D
hidden size, M, N, K of one tile: rows, gate columns, hidden.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.gemm.configs import Problem
from crossdock.gemm.grouped_hopper_kernel import load_rows
from crossdock.gemm.hopper_launch import hopper_spec, operands, tile_of
from crossdock.gemm.persistent_map import programs, scan_groups, tile_at
from crossdock.gemm.swiglu_kernel import silu_times
from crossdock.gemm.tile_map import map_options, source_rows, swizzle, tile_bound


@triton.jit
def grouped_swiglu_hopper_kernel(
    rows,  # descriptor of [T, D] in boxes [BLOCK_M, BLOCK_K]; where GATHER the address, rows `stride_r` apart
    weights,  # descriptor of [L * 2F, D] in boxes [BLOCK_N, BLOCK_K]
    ends_ptr,  # [L] int32: ends, or counts where MASKED
    row_ids_ptr,  # [R] int32 or int64, read only where GATHER
    out_ptr,  # [R, F] contiguous
    L,
    F,
    D,
    slab,
    stride_r,
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
    tiles_n = tl.cdiv(F, BLOCK_N)
    start_L, end_L, through_L = scan_groups(ends_ptr, L, slab, BLOCK_M, L_POW2, MASKED)
    tiles_m = tl.max(through_L, 0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        group, start, end = tile_at(start_L, end_L, through_L, tile_m, BLOCK_M, L_POW2)
        row_M = start + tl.arange(0, BLOCK_M)
        col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        from_M = source_rows(row_ids_ptr, row_M, end, GATHER)
        first_n = group * 2 * F + tile_n * BLOCK_N
        gate_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(D, BLOCK_K)):
            x_MK = load_rows(rows, from_M, start, k, D, stride_r, EVEN_K, GATHER, BLOCK_K)
            gate_NK = weights.load([first_n, k * BLOCK_K])
            up_NK = weights.load([first_n + F, k * BLOCK_K])
            if WIDEN:
                x_MK = x_MK.to(tl.float32)
                gate_NK = gate_NK.to(tl.float32)
                up_NK = up_NK.to(tl.float32)
            gate_MN = tl.dot(x_MK, gate_NK.T, gate_MN, input_precision="ieee")
            up_MN = tl.dot(x_MK, up_NK.T, up_MN, input_precision="ieee")
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        out_MN = silu_times(gate_MN.to(dtype), up_MN.to(dtype)).to(dtype)
        out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * F + col_N[None, :]
        tl.store(out_ptrs, out_MN, mask=(row_M < end)[:, None] & (col_N < F)[None, :])


def grouped_swiglu_hopper(
    rows_TD: Tensor, gate_up_L2FD: Tensor, ends_L: Tensor, row_ids_R: Tensor | None = None, slab: int = 0
) -> Tensor:
    """`grouped_swiglu_kernel.grouped_swiglu_ref` in one launch that never reads `ends_L` on the host."""
    groups, two_f, hidden = gate_up_L2FD.shape
    rows, inner = rows_TD.shape[0] if row_ids_R is None else row_ids_R.shape[0], two_f // 2
    out_RF = torch.empty((rows, inner), dtype=rows_TD.dtype, device=rows_TD.device)
    if out_RF.numel() == 0:
        return out_RF
    tile = tile_of(Problem("bf16_swiglu", rows, groups, inner, hidden), rows_TD.device)
    tiles = tile_bound(rows, groups, tile.block_m, slab) * -(-inner // tile.block_n)
    ends_L = ends_L.contiguous()
    grouped_swiglu_hopper_kernel[(programs(tile, tiles, rows_TD.device),)](
        *operands(rows_TD, gate_up_L2FD, tile, row_ids_R is not None),
        ends_L,
        ends_L if row_ids_R is None else row_ids_R.contiguous(),
        out_RF,
        groups,
        inner,
        hidden,
        slab,
        rows_TD.stride(0),
        EVEN_K=hidden % tile.block_k == 0,
        WIDEN=interpreting() and rows_TD.dtype == torch.bfloat16,
        **map_options(groups, row_ids_R, slab),
        **tile.launch(),
    )
    return out_RF


def _audit(problem: Problem, layout: str = "ragged") -> KernelSpec:
    return hopper_spec(
        "grouped_swiglu_hopper",
        grouped_swiglu_hopper_kernel,
        problem,
        "bf16",
        {"ends_ptr": "*i32", "row_ids_ptr": "*i32", "out_ptr": "*bf16"},
        ("L", "F", "D", "slab", "stride_r"),
        {"WIDEN": False},
        layout,
    )


AUDIT = [
    _audit(Problem("bf16_swiglu", 32 * 1024, 32, 2048, 7168)),
    _audit(Problem("bf16_swiglu", 128 * 128, 128, 768, 2048), "gather"),
    _audit(Problem("bf16_swiglu", 32 * 8, 32, 2048, 7168)),
    _audit(Problem("bf16_swiglu", 128 * 4, 128, 768, 2048), "gather"),
    _audit(Problem("bf16_swiglu", 8, 1, 2048, 7168), "masked"),
    _audit(Problem("bf16_swiglu", 4096, 1, 2048, 7168), "masked"),
]
