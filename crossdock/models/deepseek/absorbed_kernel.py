# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The two weight products of absorbed attention: W_UK goes into the queries, W_UV behind the average of latents.

    q_TQ --absorb_queries--> [latent query C | rotated query R] of each head --attend_latents--> means of portions
         means of portions --expand_values--> [H * V] of each token

RoPE of the queries rides along in the first. The second first adds up the means of a context's portions, in the
context's order, each by its share of the softmax: a launch and a round trip of float32 latents less.

Both products are a small matrix a head, so a program takes one head and a few tokens, and M is the same whatever the
number of tokens is: at decode they stream 2 * H * 128 * C weights, and rows that stay empty cost nothing. Rejected: the
batched product of the vendor's BLAS, whose choices depend on the number of tokens, and which wants the rotary part
copied beside its result.

Legend: T flat tokens of the step, N decoded ones among them, W portions of their contexts, H heads, U nope width of a
head, R its rotary width, V its value width, C latent width, Q = H * (U + R), P portions a program adds at once.
"""

from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import HAS_TRITON, interpreting, tl, triton
from crossdock.gemm.tile_map import next_power_of_2
from crossdock.models.blocks import rotate_halves, rotate_interleaved
from crossdock.models.cache import Decoding
from crossdock.models.deepseek.mla_kernel import rotated

ABSORB_N, EXPAND_N = 64, 16  # tokens of a program


def absorb_queries_ref(
    q_TQ: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor], decoding: Decoding, heads: int, interleaved: bool
) -> Tensor:
    """The specification: -> [N, H, C + R] in the dtype of q, (W_UK^T q_nope, rotated q_rope) of each decoded token.

    `weight` is kv_b_proj's, [H * (U + V), C], a head's W_UK above its W_UV; `rope` is (cos, sin), float32
    [T, 1, R / 2].
    """
    tokens_N, half = decoding.tokens_N.long(), rope[0].shape[-1]
    q_NHX = q_TQ[tokens_N].view(len(tokens_N), heads, -1)
    nope = q_NHX.shape[-1] - 2 * half
    w_HUC = weight.view(heads, -1, weight.shape[1])[:, :nope]
    latent_NHC = torch.einsum("nhu,huc->nhc", q_NHX[..., :nope].float(), w_HUC.float()).to(q_TQ.dtype)
    rotate = rotate_interleaved if interleaved else rotate_halves
    rotary_NHR = rotate(q_NHX[..., nope:], (rope[0][tokens_N], rope[1][tokens_N]))
    return torch.cat((latent_NHC, rotary_NHR), dim=-1)


def expand_values_ref(
    mean_WHC: Tensor, lse_WH: Tensor, weight: Tensor, decoding: Decoding, nope: int, out_TX: Tensor
) -> None:
    """The specification: writes out_TX[t] [H * V] = W_UV times the average latent, for each decoded token.

    `mean_WHC` and `lse_WH` are what `attend_latents` gives.
    """
    heads, latent = mean_WHC.shape[1:]
    w_HVC = weight.view(heads, -1, latent)[:, nope:]
    bounds = decoding.first_N1.tolist()
    for token, first, last in zip(decoding.tokens_N.tolist(), bounds[:-1], bounds[1:], strict=True):
        share_WH = (lse_WH[first:last].double() * torch.log(torch.tensor(2.0))).softmax(0).float()
        mean_HC = (share_WH[..., None] * mean_WHC[first:last]).sum(0).to(weight.dtype)
        out_TX[token] = torch.einsum("hc,hvc->hv", mean_HC.float(), w_HVC.float()).flatten()


@triton.jit(do_not_specialize=["N"])
def absorb_queries_kernel(
    q_ptr,  # [T, H * (U + R)], rows STRIDE_Q apart
    weight_ptr,  # [H * (U + V), C] contiguous
    cos_ptr,  # [T, HALF] float32 contiguous
    sin_ptr,
    tokens_ptr,  # [N] int32
    out_ptr,  # [N, H, C + R] contiguous
    N,
    STRIDE_Q: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bf16's bit patterns, so it gets float32
    U: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,  # R / 2
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program (n, h, c) computes a tile of latent queries of head h, or, as the last of its c, rotates."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_C
    live_N = n_N < N
    # Rows past the end compute the last one again, which costs no mask; they are never stored.
    token_N = tl.load(tokens_ptr + tl.minimum(n_N, N - 1)).to(tl.int64)
    q_ptrs = q_ptr + token_N * STRIDE_Q + head * (U + 2 * HALF)
    out_ptrs = out_ptr + (n_N.to(tl.int64) * tl.num_programs(1) + head) * (C + 2 * HALF)
    if column < C:
        c_C = column + tl.arange(0, BLOCK_C)
        w_ptr = weight_ptr + head.to(tl.int64) * (U + V) * C
        acc_NC = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        for u in range(0, U, BLOCK_U):
            u_U = u + tl.arange(0, BLOCK_U)
            q_NU = tl.load(q_ptrs[:, None] + u_U[None, :], mask=(u_U < U)[None, :], other=0.0)
            w_mask = (u_U < U)[:, None] & (c_C < C)[None, :]
            w_UC = tl.load(w_ptr + u_U[:, None] * C + c_C[None, :], mask=w_mask, other=0.0)
            if WIDEN:
                q_NU, w_UC = q_NU.to(tl.float32), w_UC.to(tl.float32)
            acc_NC = tl.dot(q_NU, w_UC, acc_NC, input_precision="ieee")
        to_ptrs = out_ptrs[:, None] + c_C[None, :]
        tl.store(to_ptrs, acc_NC.to(out_ptr.dtype.element_ty), mask=live_N[:, None] & (c_C < C)[None, :])
    else:
        r_R = tl.arange(0, BLOCK_HALF)[None, :]
        cos_ptrs, sin_ptrs = cos_ptr + token_N[:, None] * HALF, sin_ptr + token_N[:, None] * HALF
        first, second = rotated(q_ptrs[:, None] + U, cos_ptrs, sin_ptrs, r_R < HALF, HALF, INTERLEAVED, r_R)
        rotary_ptrs = out_ptrs[:, None] + C + r_R
        mask = live_N[:, None] & (r_R < HALF)
        tl.store(rotary_ptrs, first.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(rotary_ptrs + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _logs(lse_ptr, row_N, part_1P, count_N, heads):
    """lse of the portions `part_1P` of each token, -inf where it has fewer."""
    at_NP = row_N[:, None] + part_1P * heads
    return tl.load(lse_ptr + at_NP, mask=part_1P < count_N[:, None], other=float("-inf"))


@triton.jit(do_not_specialize=["N"])
def expand_values_kernel(
    mean_ptr,  # [W, H, C] float32 contiguous
    lse_ptr,  # [W, H] float32 contiguous
    weight_ptr,  # [H * (U + V), C] contiguous
    tokens_ptr,  # [N] int32
    first_ptr,  # [N + 1] int32
    out_ptr,  # [T, H * V] contiguous
    N,
    WIDEN: tl.constexpr,
    U: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,  # portions in flight
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (n, h) computes a head's values for BLOCK_N tokens."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, heads = tl.program_id(1), tl.num_programs(1)
    from_N = tl.minimum(n_N, N - 1)  # rows past the end compute the last one again and are never stored
    first_N = tl.load(first_ptr + from_N)
    count_N = tl.load(first_ptr + from_N + 1) - first_N
    most = tl.max(count_N)
    row_N = first_N.to(tl.int64) * heads + head  # of a token's first portion; the next are `heads` apart
    p_P = tl.arange(0, BLOCK_P)[None, :]
    top_N = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for part in range(0, most, BLOCK_P):
        top_N = tl.maximum(top_N, tl.max(_logs(lse_ptr, row_N, part + p_P, count_N, heads), 1))
    total_N = tl.zeros((BLOCK_N,), tl.float32)
    for part in range(0, most, BLOCK_P):
        total_N += tl.sum(tl.exp2(_logs(lse_ptr, row_N, part + p_P, count_N, heads) - top_N[:, None]), 1)
    w_ptr = weight_ptr + (head.to(tl.int64) * (U + V) + U) * C
    v_V = tl.arange(0, BLOCK_V)
    acc_NV = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        c_C = c + tl.arange(0, BLOCK_C)
        w_mask = (c_C < C)[:, None] & (v_V < V)[None, :]
        w_CV = tl.load(w_ptr + v_V[None, :] * C + c_C[:, None], mask=w_mask, other=0.0)
        mean_NC = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        for part in range(0, most, BLOCK_P):  # a token with fewer portions adds zeros
            lse_NP = _logs(lse_ptr, row_N, part + p_P, count_N, heads)
            share_NP = tl.exp2(lse_NP - top_N[:, None]) / total_N[:, None]
            from_NP = (row_N[:, None] + (part + p_P) * heads) * C
            mask_NPC = (part + p_P < count_N[:, None])[:, :, None] & (c_C < C)[None, None, :]
            part_NPC = tl.load(mean_ptr + from_NP[:, :, None] + c_C[None, None, :], mask=mask_NPC, other=0.0)
            mean_NC += tl.sum(share_NP[:, :, None] * part_NPC, 1)
        mean_NC = mean_NC.to(weight_ptr.dtype.element_ty)
        if WIDEN:
            mean_NC, w_CV = mean_NC.to(tl.float32), w_CV.to(tl.float32)
        acc_NV = tl.dot(mean_NC, w_CV, acc_NV, input_precision="ieee")
    token_N = tl.load(tokens_ptr + from_N).to(tl.int64)
    to_ptrs = out_ptr + (token_N * heads + head)[:, None] * V + v_V[None, :]
    tl.store(to_ptrs, acc_NV.to(out_ptr.dtype.element_ty), mask=(n_N < N)[:, None] & (v_V < V)[None, :])


def absorb_queries_triton(
    q_TQ: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor], decoding: Decoding, heads: int, interleaved: bool
) -> Tensor:
    """`absorb_queries_ref` in one launch."""
    count, latent, half = len(decoding.tokens_N), weight.shape[1], rope[0].shape[-1]
    nope = q_TQ.shape[1] // heads - 2 * half
    value = weight.shape[0] // heads - nope
    q_TQ = q_TQ if q_TQ.stride(1) == 1 else q_TQ.contiguous()
    out_NHX = q_TQ.new_empty(count, heads, latent + 2 * half)
    config = _absorb_config(q_TQ.dtype, nope, value, latent, half)
    absorb_queries_kernel[(-(-count // ABSORB_N), heads, -(-latent // config["BLOCK_C"]) + 1)](
        q_TQ,
        weight,
        rope[0],
        rope[1],
        decoding.tokens_N,
        out_NHX,
        count,
        STRIDE_Q=q_TQ.stride(0),
        INTERLEAVED=interleaved,
        WIDEN=interpreting() and q_TQ.dtype == torch.bfloat16,
        **config,
    )
    return out_NHX


def expand_values_triton(
    mean_WHC: Tensor, lse_WH: Tensor, weight: Tensor, decoding: Decoding, nope: int, out_TX: Tensor
) -> None:
    """`expand_values_ref` in one launch; `out_TX` is contiguous."""
    count, (heads, latent) = len(decoding.tokens_N), mean_WHC.shape[1:]
    expand_values_kernel[(-(-count // EXPAND_N), heads)](
        mean_WHC,
        lse_WH,
        weight,
        decoding.tokens_N,
        decoding.first_N1,
        out_TX,
        count,
        WIDEN=interpreting() and weight.dtype == torch.bfloat16,
        **_expand_config(weight.dtype, nope, weight.shape[0] // heads - nope, latent),
    )


def _absorb_config(dtype: torch.dtype, nope: int, value: int, latent: int, half: int) -> dict[str, int]:
    """Sizes and tile; float32 has no matrix unit and needs registers for both operands."""
    wide = dtype == torch.float32
    sizes = {"U": nope, "V": value, "C": latent, "HALF": half}
    tile = {"BLOCK_C": 64 if wide else 128, "BLOCK_U": 16 if wide else 64, "BLOCK_HALF": next_power_of_2(half)}
    return sizes | {"BLOCK_N": ABSORB_N} | tile | {"num_warps": 4, "num_stages": 2}


def _expand_config(dtype: torch.dtype, nope: int, value: int, latent: int) -> dict[str, int]:
    """The same of the other kernel, whose registers hold portions in flight."""
    sizes = {"U": nope, "V": value, "C": latent}
    tile = {"BLOCK_P": 8, "BLOCK_C": 16 if dtype == torch.float32 else 64, "BLOCK_V": max(16, next_power_of_2(value))}
    return sizes | {"BLOCK_N": EXPAND_N} | tile | {"num_warps": 8, "num_stages": 2}


def _audit(name: str, kernel: Any, element: str, config: dict[str, Any]) -> KernelSpec:
    constexprs = {key: value for key, value in config.items() if key in kernel.arg_names}
    floats = dict.fromkeys(("mean_ptr", "lse_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    floats |= dict.fromkeys(("q_ptr", "weight_ptr", "out_ptr"), f"*{element}")
    kinds = floats | {"tokens_ptr": "*i32", "first_ptr": "*i32", "N": "i32"} | dict.fromkeys(constexprs, "constexpr")
    return KernelSpec(
        name=name,
        kernel=kernel,
        config=f"{element}, 128 heads of 128 + 64, latent 512",
        signature={argument: kinds[argument] for argument in kernel.arg_names},
        constexprs=constexprs,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        needs_matrix_instruction=element != "fp32",
    )


_ABSORB: dict[str, Any] = {"STRIDE_Q": 128 * 192, "INTERLEAVED": True, "WIDEN": False}
AUDIT = [
    spec
    for element, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    if HAS_TRITON
    for spec in (
        _audit("absorb_queries", absorb_queries_kernel, element, _ABSORB | _absorb_config(dtype, 128, 128, 512, 32)),
        _audit("expand_values", expand_values_kernel, element, {"WIDEN": False} | _expand_config(dtype, 128, 128, 512)),
    )
]
