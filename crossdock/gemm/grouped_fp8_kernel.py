# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The grouped product of e4m3 rows and weights, with the scales folded in every 128 of K.

Hopper's tensor cores keep about 14 bits while they sum FP8 products, too few for K = 7168. So each block of 128 is
summed on its own, scaled, and added to a float32 total (DeepSeek-V3 technical report, section 3.3.2, "Increasing
Accumulation Precision"); a block is also exactly what shares a scale, so the fold costs one multiply-add an element.

    K:            | block 0 | block 1 | ...
    acc[m, n]  =    dot_0 * (x_scale[m, 0] * w_scale[n / 128, 0])  +  dot_1 * (...)  +  ...

Tiles and order as in `grouped_kernel`: a row's bits depend on no other row.

Legend: R rows, L groups, N output columns, K inner size, B blocks of 128; M, N, K also of one tile.
"""

from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.gemm.grouped_kernel import is_aligned
from crossdock.gemm.quantize_kernel import BLOCK, spread
from crossdock.gemm.tile_map import GROUP_M, find_tile, next_power_of_2, swizzle, tile_bound
from crossdock.linear import linear


def grouped_gemm_fp8_ref(
    q_RK: Tensor, scale_RB: Tensor, wq_LNK: Tensor, wscale_LBB: Tensor, ends_L: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The specification, and the torch backend: dequantise one group after another, multiply in float32 -> [R, N]."""
    (rows, inner), columns = q_RK.shape, wq_LNK.shape[1]
    out_RN = torch.empty((rows, columns), dtype=out_dtype, device=q_RK.device)
    start = 0
    for group, end in enumerate(ends_L.tolist()):
        if end > start:
            x_RK = q_RK[start:end].float() * spread(scale_RB[start:end], inner, 1)
            w_scale_NK = spread(spread(wscale_LBB[group], columns, 0), inner, 1)
            out_RN[start:end] = linear(x_RK, wq_LNK[group].float() * w_scale_NK)
        start = end
    return out_RN


@triton.jit
def grouped_gemm_fp8_kernel(
    rows_ptr,  # [R, K] e4m3, rows `stride_r` apart
    scale_ptr,  # [R, B] float32 contiguous
    weights_ptr,  # [L, N, K] e4m3, groups `stride_l` apart, columns of the output `stride_n` apart
    wscale_ptr,  # [L, ceil(N / 128), B] float32 contiguous
    ends_ptr,  # [L] int32
    out_ptr,  # [R, N] contiguous
    tiles_m,
    L,
    N,
    K,
    stride_r,
    stride_l,
    stride_n,
    ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK
    L_POW2: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,  # of N and of K: a tile's weights share one scale a step
):
    tiles_n = tl.cdiv(N, BLOCK)
    blocks_k = tl.cdiv(K, BLOCK)
    tile_m, tile_n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    group, start, end = find_tile(ends_ptr, tile_m, L, BLOCK_M, L_POW2)
    if start >= end:
        return
    # Rows and columns past the end read the last one again, which costs no mask; they are never stored.
    row_M = start + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK + tl.arange(0, BLOCK)
    from_M = tl.minimum(row_M, end - 1).to(tl.int64)
    from_N = (col_N if EVEN_N else tl.minimum(col_N, N - 1)).to(tl.int64)
    k_K = tl.arange(0, BLOCK)
    x_ptrs = rows_ptr + from_M[:, None] * stride_r + k_K[None, :]
    w_ptrs = weights_ptr + group.to(tl.int64) * stride_l + from_N[None, :] * stride_n + k_K[:, None]
    if ALIGNED:
        x_ptrs = tl.multiple_of(x_ptrs, (16, 16))
        w_ptrs = tl.multiple_of(w_ptrs, (16, 16))
    xs_ptrs = scale_ptr + from_M * blocks_k
    # The weights' scale is one number, read as a vector of M: it goes through the same pipeline as the rows' scales.
    ws_ptrs = wscale_ptr + (group.to(tl.int64) * tiles_n + tile_n) * blocks_k + tl.zeros((BLOCK_M,), tl.int64)
    acc_MN = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
    for k in range(0, blocks_k):
        if EVEN_K:
            x_MK = tl.load(x_ptrs)
            w_KN = tl.load(w_ptrs)
        else:
            left = K - k * BLOCK
            x_MK = tl.load(x_ptrs, mask=k_K[None, :] < left, other=0.0)
            w_KN = tl.load(w_ptrs, mask=k_K[:, None] < left, other=0.0)
        scale_M = tl.load(xs_ptrs + k) * tl.load(ws_ptrs + k)
        acc_MN += tl.dot(x_MK, w_KN) * scale_M[:, None]
        x_ptrs += BLOCK
        w_ptrs += BLOCK
    out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * N + col_N[None, :]
    tl.store(out_ptrs, acc_MN.to(out_ptr.dtype.element_ty), mask=(row_M < end)[:, None] & (col_N < N)[None, :])


def tile_config(rows: int, groups: int) -> dict[str, int]:
    """Rows a tile, warps and stages, by rows a group: 64 while streaming the weights is the limit, 128 beyond."""
    if rows > 64 * groups:
        return {"BLOCK_M": 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "num_warps": 4, "num_stages": 3}


def grouped_gemm_fp8_triton(
    q_RK: Tensor, scale_RB: Tensor, wq_LNK: Tensor, wscale_LBB: Tensor, ends_L: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """`grouped_gemm_fp8_ref` in one launch that never reads `ends_L` on the host."""
    (rows, inner), (groups, columns, _) = q_RK.shape, wq_LNK.shape
    out_RN = torch.empty((rows, columns), dtype=out_dtype, device=q_RK.device)
    if out_RN.numel() == 0:
        return out_RN
    q_RK = q_RK if q_RK.stride(1) == 1 else q_RK.contiguous()
    wq_LNK = wq_LNK if wq_LNK.stride(2) == 1 else wq_LNK.contiguous()
    config = tile_config(rows, groups)
    tiles_m = tile_bound(rows, groups, config["BLOCK_M"])
    strides = q_RK.stride(0), wq_LNK.stride(0), wq_LNK.stride(1)
    grouped_gemm_fp8_kernel[(tiles_m * -(-columns // BLOCK),)](
        q_RK,
        scale_RB.contiguous(),
        wq_LNK,
        wscale_LBB.contiguous(),
        ends_L,
        out_RN,
        tiles_m,
        groups,
        columns,
        inner,
        *strides,
        ALIGNED=is_aligned(q_RK, *strides) and is_aligned(wq_LNK),
        EVEN_N=columns % BLOCK == 0,
        EVEN_K=inner % BLOCK == 0,
        L_POW2=next_power_of_2(groups),
        GROUP_M=GROUP_M,
        BLOCK=BLOCK,
        **config,
    )
    return out_RN


def _audit(rows: int, columns: int, inner: int) -> KernelSpec:
    config: dict[str, Any] = tile_config(rows, groups=32)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    flags = {"ALIGNED": True, "EVEN_N": columns % BLOCK == 0, "EVEN_K": inner % BLOCK == 0}
    constexprs = flags | {"L_POW2": 32, "GROUP_M": GROUP_M} | config | {"BLOCK": BLOCK}
    pointers = {"rows_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "weights_ptr": "*fp8e4nv", "wscale_ptr": "*fp32"}
    return KernelSpec(
        name="grouped_gemm_fp8",
        kernel=grouped_gemm_fp8_kernel,
        config=f"R={rows} L=32 N={columns} K={inner}, BLOCK_M={config['BLOCK_M']}",
        signature=pointers
        | {"ends_ptr": "*i32", "out_ptr": "*bf16"}
        | dict.fromkeys(("tiles_m", "L", "N", "K", "stride_r", "stride_l", "stride_n"), "i32")
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        needs_matrix_instruction=True,
    )


AUDIT = [_audit(32 * 1024, 4096, 7168), _audit(32 * 1024, 7168, 2048), _audit(32 * 8, 4096, 7168)]
