# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The grouped product of float rows and weights as one Triton kernel over ragged groups.

A program computes one [BLOCK_M, BLOCK_N] tile of one group, walking K in steps of BLOCK_K from 0 upward. That order,
and the tile sizes in N and K, depend on the dtype alone and never on the number of rows, so a row's result does not
change with its company; BLOCK_M does follow the number of rows, but both of its values use the same instruction.

Legend: R rows, L groups (expert slots on this rank), N output columns, K inner size; M, N, K also of one tile.
"""

from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.gemm.tile_map import GROUP_M, find_tile, next_power_of_2, swizzle, tile_bound


def grouped_gemm_ref(rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor) -> Tensor:
    """The specification: rows[start:end] @ weights[l]^T for each group l, summed in float32 -> [R, N]."""
    out_RN = torch.empty((rows_RK.shape[0], weights_LNK.shape[1]), dtype=rows_RK.dtype, device=rows_RK.device)
    start = 0
    for w_NK, end in zip(weights_LNK, ends_L.tolist(), strict=True):
        out_RN[start:end] = rows_RK[start:end].float() @ w_NK.float().t()
        start = end
    return out_RN


@triton.jit
def grouped_gemm_kernel(
    rows_ptr,  # [R, K], rows `stride_r` apart
    weights_ptr,  # group l at l * stride_l; inside, columns or rows `stride_w` apart
    ends_ptr,  # [L] int32
    out_ptr,  # [R, N] contiguous
    tiles_m,
    L,
    N,
    K,
    stride_r,
    stride_l,
    stride_w,
    K_MAJOR: tl.constexpr,  # weights have unit stride along K ([L, N, K] in memory), else along N
    ALIGNED: tl.constexpr,  # 16-byte multiples: both addresses, all strides, a tile's first column
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    WIDEN: tl.constexpr,  # the interpreter multiplies bf16's bit patterns, so it gets float32
    L_POW2: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = swizzle(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    group, start, end = find_tile(ends_ptr, tile_m, L, BLOCK_M, L_POW2)
    if start >= end:
        return
    # Rows and columns past the end read the last one again, which costs no mask; they are never stored.
    row_M = start + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    from_M = tl.minimum(row_M, end - 1).to(tl.int64)
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


def tile_config(dtype: torch.dtype, rows: int, groups: int) -> dict[str, int]:
    """Tile sizes, warps and stages: BLOCK_N and BLOCK_K by dtype alone (see the top), BLOCK_M by rows a group.

    float32 runs without tensor cores and needs registers for both operands, hence the small tile.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
    if rows > 64 * groups:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


def grouped_gemm_triton(rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor) -> Tensor:
    """`grouped_gemm_ref` in one launch that never reads `ends_L` on the host; weights may be a transposed view."""
    (rows, inner), (groups, columns, _) = rows_RK.shape, weights_LNK.shape
    out_RN = torch.empty((rows, columns), dtype=rows_RK.dtype, device=rows_RK.device)
    if out_RN.numel() == 0:
        return out_RN
    rows_RK = rows_RK if rows_RK.stride(1) == 1 else rows_RK.contiguous()
    if 1 not in weights_LNK.stride()[1:]:
        weights_LNK = weights_LNK.contiguous()
    k_major = weights_LNK.stride(2) == 1
    config = tile_config(rows_RK.dtype, rows, groups)
    tiles_m = tile_bound(rows, groups, config["BLOCK_M"])
    even_n = columns % config["BLOCK_N"] == 0
    strides = rows_RK.stride(0), weights_LNK.stride(0), weights_LNK.stride(1 if k_major else 2)
    grouped_gemm_kernel[(tiles_m * -(-columns // config["BLOCK_N"]),)](
        rows_RK,
        weights_LNK,
        ends_L,
        out_RN,
        tiles_m,
        groups,
        columns,
        inner,
        *strides,
        K_MAJOR=k_major,
        ALIGNED=is_aligned(rows_RK, *strides) and is_aligned(weights_LNK) and (k_major or even_n),
        EVEN_N=even_n,
        EVEN_K=inner % config["BLOCK_K"] == 0,
        WIDEN=interpreting() and rows_RK.dtype == torch.bfloat16,
        L_POW2=next_power_of_2(groups),
        GROUP_M=GROUP_M,
        **config,
    )
    return out_RN


def is_aligned(tensor: Tensor, *strides: int) -> bool:
    """Whether the address and the strides (in the tensor's elements) are multiples of 16 bytes."""
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in strides)


def _audit(dtype: torch.dtype, rows: int, columns: int, inner: int, k_major: bool = True) -> KernelSpec:
    config: dict[str, Any] = tile_config(dtype, rows, groups=32)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    even = {"EVEN_N": columns % config["BLOCK_N"] == 0, "EVEN_K": inner % config["BLOCK_K"] == 0}
    flags = {"K_MAJOR": k_major, "ALIGNED": True} | even | {"WIDEN": False, "L_POW2": 32, "GROUP_M": GROUP_M}
    constexprs = flags | config
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    pointers = {"rows_ptr": element, "weights_ptr": element, "ends_ptr": "i32", "out_ptr": element}
    names = ("tiles_m", "L", "N", "K", "stride_r", "stride_l", "stride_w")
    return KernelSpec(
        name="grouped_gemm" if k_major else "grouped_gemm_dx",
        kernel=grouped_gemm_kernel,
        config=f"{element}, R={rows} L=32 N={columns} K={inner}, BLOCK_M={config['BLOCK_M']}",
        signature={name: f"*{kind}" for name, kind in pointers.items()}
        | dict.fromkeys(names, "i32")
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        needs_matrix_instruction=dtype != torch.float32,
    )


AUDIT = [
    _audit(torch.bfloat16, 32 * 1024, 4096, 7168),
    _audit(torch.bfloat16, 32 * 1024, 7168, 2048),
    _audit(torch.bfloat16, 32 * 8, 4096, 7168),
    _audit(torch.bfloat16, 32 * 1024, 7168, 4096, k_major=False),
    _audit(torch.float32, 32 * 1024, 4096, 7168),
]
