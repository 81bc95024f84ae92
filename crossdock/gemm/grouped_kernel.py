# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The grouped product of float rows and weights as one Triton kernel over ragged groups.

A program computes one [BLOCK_M, BLOCK_N] tile of one group, walking K in steps of BLOCK_K from 0 upward. BLOCK_K
depends on the dtype alone, so every element is summed in one order whatever tile it falls into, and a row's result does
not change with its company. Rows may be gathered on the way in (`row_ids`), which saves a launch and a copy of them.

Legend: R rows in group order, T rows in memory (R without `row_ids`), L groups (expert slots on this rank), N output
columns, K inner size; M, N, K also of one tile.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.gemm import configs
from crossdock.gemm.configs import Kind, Problem
from crossdock.gemm.product_specs import product_spec, tile_for
from crossdock.gemm.tile_map import find_tile, map_options, rows_of, source_rows, spans, swizzle, tile_bound


def grouped_gemm_ref(
    rows_TK: Tensor, weights_LNK: Tensor, ends_L: Tensor, row_ids_R: Tensor | None = None, slab: int = 0
) -> Tensor:
    """The specification: rows[start:end] @ weights[l]^T for each group l, summed in float32 -> [R, N]."""
    rows = rows_TK.shape[0] if row_ids_R is None else row_ids_R.shape[0]
    out_RN = torch.empty((rows, weights_LNK.shape[1]), dtype=rows_TK.dtype, device=rows_TK.device)
    for group, start, end in spans(ends_L, slab):
        x_MK = rows_of(rows_TK, start, end, row_ids_R).float()
        out_RN[start:end] = x_MK @ weights_LNK[group].float().t()
    return out_RN


@triton.jit
def grouped_gemm_kernel(
    rows_ptr,  # [T, K], rows `stride_r` apart
    weights_ptr,  # group l at l * stride_l; inside, columns or rows `stride_w` apart
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
    stride_w,
    K_MAJOR: tl.constexpr,  # weights have unit stride along K ([L, N, K] in memory), else along N
    ALIGNED: tl.constexpr,  # 16-byte multiples: both addresses, all strides, a tile's first column
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N
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
    tile_m, tile_n = swizzle(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    group, start, end = find_tile(ends_ptr, tile_m, L, BLOCK_M, L_POW2, slab, MASKED)
    if start >= end:
        return
    row_M = start + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    from_M = source_rows(row_ids_ptr, row_M, end, GATHER)
    from_N = (col_N if EVEN_N else tl.minimum(col_N, N - 1)).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K)
    x_ptrs = rows_ptr + from_M[:, None] * stride_r + k_K[None, :]
    base_ptr = weights_ptr + group.to(tl.int64) * stride_l
    if K_MAJOR:
        w_ptrs = base_ptr + from_N[None, :] * stride_w + k_K[:, None]
        w_step = BLOCK_K
    else:
        w_ptrs = base_ptr + from_N[None, :] + k_K[:, None].to(tl.int64) * stride_w
        w_step = tl.full((), BLOCK_K, tl.int64) * stride_w
    if ALIGNED:
        x_ptrs = tl.multiple_of(x_ptrs, (16, 16))
        w_ptrs = tl.multiple_of(w_ptrs, (16, 16))
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x_MK = tl.load(x_ptrs)
            w_KN = tl.load(w_ptrs)
        else:
            left = K - k * BLOCK_K
            x_MK = tl.load(x_ptrs, mask=k_K[None, :] < left, other=0.0)
            w_KN = tl.load(w_ptrs, mask=k_K[:, None] < left, other=0.0)
        if WIDEN:
            x_MK = x_MK.to(tl.float32)
            w_KN = w_KN.to(tl.float32)
        acc_MN = tl.dot(x_MK, w_KN, acc_MN, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * N + col_N[None, :]
    tl.store(out_ptrs, acc_MN.to(out_ptr.dtype.element_ty), mask=(row_M < end)[:, None] & (col_N < N)[None, :])


def grouped_gemm_triton(
    rows_TK: Tensor,
    weights_LNK: Tensor,
    ends_L: Tensor,
    row_ids_R: Tensor | None = None,
    slab: int = 0,
) -> Tensor:
    """`grouped_gemm_ref` in one launch that never reads `ends_L` on the host; weights may be a transposed view."""
    groups, columns, inner = weights_LNK.shape
    rows = rows_TK.shape[0] if row_ids_R is None else row_ids_R.shape[0]
    out_RN = torch.empty((rows, columns), dtype=rows_TK.dtype, device=rows_TK.device)
    if out_RN.numel() == 0:
        return out_RN
    rows_TK = rows_TK if rows_TK.stride(1) == 1 else rows_TK.contiguous()
    if 1 not in weights_LNK.stride()[1:]:
        weights_LNK = weights_LNK.contiguous()
    k_major = weights_LNK.stride(2) == 1
    kind: Kind = "fp32" if rows_TK.dtype == torch.float32 else "bf16"
    tile = configs.choose(Problem(kind, rows, groups, columns, inner), rows_TK.device)
    tiles_m = tile_bound(rows, groups, tile.block_m, slab)
    even_n = columns % tile.block_n == 0
    strides = rows_TK.stride(0), weights_LNK.stride(0), weights_LNK.stride(1 if k_major else 2)
    ends_L = ends_L.contiguous()
    grouped_gemm_kernel[(tiles_m * -(-columns // tile.block_n),)](
        rows_TK,
        weights_LNK,
        ends_L,
        ends_L if row_ids_R is None else row_ids_R.contiguous(),
        out_RN,
        tiles_m,
        groups,
        columns,
        inner,
        slab,
        *strides,
        K_MAJOR=k_major,
        ALIGNED=is_aligned(rows_TK, *strides) and is_aligned(weights_LNK) and (k_major or even_n),
        EVEN_N=even_n,
        EVEN_K=inner % tile.block_k == 0,
        WIDEN=interpreting() and rows_TK.dtype == torch.bfloat16,
        **map_options(groups, row_ids_R, slab),
        **tile.launch(),
    )
    return out_RN


def is_aligned(tensor: Tensor, *strides: int) -> bool:
    """Whether the address and the strides (in the tensor's elements) are multiples of 16 bytes."""
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in strides)


def _audit(problem: Problem, k_major: bool = True, layout: str = "ragged") -> KernelSpec:
    tile, element = tile_for(problem), problem.kind
    even = {"EVEN_N": problem.columns % tile.block_n == 0, "EVEN_K": problem.inner % tile.block_k == 0}
    pointers = {"rows_ptr": element, "weights_ptr": element, "ends_ptr": "i32", "row_ids_ptr": "i32"}
    return product_spec(
        "grouped_gemm" if k_major else "grouped_gemm_dx",
        grouped_gemm_kernel,
        problem,
        {name: f"*{kind}" for name, kind in (pointers | {"out_ptr": element}).items()},
        ("tiles_m", "L", "N", "K", "slab", "stride_r", "stride_l", "stride_w"),
        {"K_MAJOR": k_major, "ALIGNED": True} | even | {"WIDEN": False},
        layout,
    )


AUDIT = [
    _audit(Problem("bf16", 32 * 1024, 32, 4096, 7168)),
    _audit(Problem("bf16", 32 * 8, 32, 4096, 7168), layout="gather"),
    _audit(Problem("bf16", 32 * 8, 32, 4096, 7168), layout="masked"),
    _audit(Problem("bf16", 32 * 1024, 32, 7168, 4096), k_major=False),
    _audit(Problem("fp32", 32 * 1024, 32, 4096, 7168)),
]
