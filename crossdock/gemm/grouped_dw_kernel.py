# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The weights' gradient of the grouped product as one Triton kernel, so that training never reads `ends` either.

A program computes one [BLOCK_N, BLOCK_K] tile of one group's dW and walks that group's rows from first to last, so
the sum has one order however often it runs; a group without rows walks none and stores zeros.

Legend: R rows, L groups (expert slots on this rank), N output columns, K inner size; N, K, R also of one tile.
"""

from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.gemm.grouped_kernel import is_aligned


def grouped_dw_ref(dout_RN: Tensor, rows_RK: Tensor, ends_L: Tensor) -> Tensor:
    """The specification: dout[start:end]^T @ rows[start:end] for each group, summed in float32 -> [L, N, K]."""
    pieces, start = [], 0
    for end in ends_L.tolist():
        pieces.append(dout_RN[start:end].float().t() @ rows_RK[start:end].float())
        start = end
    return torch.stack(pieces).to(rows_RK.dtype)


@triton.jit
def grouped_dw_kernel(
    dout_ptr,  # [R, N], rows `stride_d` apart
    rows_ptr,  # [R, K], rows `stride_r` apart
    ends_ptr,  # [L] int32
    dw_ptr,  # [L, N, K] contiguous
    N,
    K,
    stride_d,
    stride_r,
    ALIGNED: tl.constexpr,  # 16-byte multiples: addresses and strides
    EVEN: tl.constexpr,  # N and K are multiples of BLOCK_N and BLOCK_K
    WIDEN: tl.constexpr,  # the interpreter multiplies bf16's bit patterns, so it gets float32
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    group = pid // (tiles_n * tiles_k)
    tile = pid % (tiles_n * tiles_k)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    count = tl.load(ends_ptr + group) - start
    row_R = tl.arange(0, BLOCK_R)
    col_N = tile // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    col_K = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    from_R = (start + row_R).to(tl.int64)
    d_ptrs = dout_ptr + from_R[None, :] * stride_d + col_N[:, None]
    x_ptrs = rows_ptr + from_R[:, None] * stride_r + col_K[None, :]
    if ALIGNED:
        d_ptrs = tl.multiple_of(d_ptrs, (16, 16))
        x_ptrs = tl.multiple_of(x_ptrs, (16, 16))
    d_step = tl.full((), BLOCK_R, tl.int64) * stride_d
    x_step = tl.full((), BLOCK_R, tl.int64) * stride_r
    acc_NK = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for r in range(0, tl.cdiv(count, BLOCK_R)):
        here_R = row_R < count - r * BLOCK_R
        if EVEN:
            d_NR = tl.load(d_ptrs, mask=here_R[None, :], other=0.0)
            x_RK = tl.load(x_ptrs, mask=here_R[:, None], other=0.0)
        else:
            d_NR = tl.load(d_ptrs, mask=here_R[None, :] & (col_N < N)[:, None], other=0.0)
            x_RK = tl.load(x_ptrs, mask=here_R[:, None] & (col_K < K)[None, :], other=0.0)
        if WIDEN:
            d_NR = d_NR.to(tl.float32)
            x_RK = x_RK.to(tl.float32)
        acc_NK = tl.dot(d_NR, x_RK, acc_NK, input_precision="ieee")
        d_ptrs += d_step
        x_ptrs += x_step
    out_ptrs = dw_ptr + (group.to(tl.int64) * N + col_N[:, None]) * K + col_K[None, :]
    tl.store(out_ptrs, acc_NK.to(dw_ptr.dtype.element_ty), mask=(col_N < N)[:, None] & (col_K < K)[None, :])


def tile_config(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes, warps and stages; float32 runs without tensor cores, hence its small tile.

    A tile of 128x128 spills registers on sm_90: dout stands transposed and both operands' addresses are kept.
    """
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_R": 64, "num_warps": 8, "num_stages": 3}


def grouped_dw_triton(dout_RN: Tensor, rows_RK: Tensor, ends_L: Tensor) -> Tensor:
    """`grouped_dw_ref` in one launch that never reads `ends_L` on the host."""
    ends_L = ends_L.contiguous()
    groups, columns, inner = ends_L.shape[0], dout_RN.shape[1], rows_RK.shape[1]
    dw_LNK = torch.empty((groups, columns, inner), dtype=rows_RK.dtype, device=rows_RK.device)
    if dw_LNK.numel() == 0:
        return dw_LNK
    dout_RN = dout_RN if dout_RN.stride(1) == 1 else dout_RN.contiguous()
    rows_RK = rows_RK if rows_RK.stride(1) == 1 else rows_RK.contiguous()
    config = tile_config(rows_RK.dtype)
    tiles = -(-columns // config["BLOCK_N"]) * -(-inner // config["BLOCK_K"])
    grouped_dw_kernel[(groups * tiles,)](
        dout_RN,
        rows_RK,
        ends_L,
        dw_LNK,
        columns,
        inner,
        dout_RN.stride(0),
        rows_RK.stride(0),
        ALIGNED=is_aligned(dout_RN, dout_RN.stride(0)) and is_aligned(rows_RK, rows_RK.stride(0)),
        EVEN=columns % config["BLOCK_N"] == 0 and inner % config["BLOCK_K"] == 0,
        WIDEN=interpreting() and rows_RK.dtype == torch.bfloat16,
        **config,
    )
    return dw_LNK


def _audit(dtype: torch.dtype, columns: int, inner: int) -> KernelSpec:
    config: dict[str, Any] = tile_config(dtype)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    constexprs = {"ALIGNED": True, "EVEN": True, "WIDEN": False} | config
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    pointers = {"dout_ptr": element, "rows_ptr": element, "ends_ptr": "i32", "dw_ptr": element}
    return KernelSpec(
        name="grouped_gemm_dw",
        kernel=grouped_dw_kernel,
        config=f"{element}, N={columns} K={inner}",
        signature={name: f"*{kind}" for name, kind in pointers.items()}
        | dict.fromkeys(("N", "K", "stride_d", "stride_r"), "i32")
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        needs_matrix_instruction=dtype != torch.float32,
    )


AUDIT = [_audit(torch.bfloat16, 4096, 7168), _audit(torch.float32, 4096, 7168)]
