# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The weight product in front of absorbed attention: W_UK goes into the queries.

    q_TQ --absorb_queries--> [latent query C | rotated query R] of each head --attend_latents--> means of portions
         means of portions --expand_values--> [H * V] of each token

RoPE of the queries rides along. The product is a small matrix a head, so a program takes one head and a few tokens, and
M is the same whatever the number of tokens is: at decode it streams H * 128 * C weights, and rows that stay empty cost
nothing. Rejected: the batched product of the vendor's BLAS, whose choices depend on the number of tokens, and which
wants the rotary part copied beside its result.

Legend: T flat tokens of the step, N decoded ones among them, H heads, U nope width of a head, R its rotary width, V its
value width, C latent width, Q = H * (U + R).
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import HAS_TRITON, interpreting, tl, triton
from crossdock.gemm.tile_map import next_power_of_2
from crossdock.models.blocks import rotate_halves, rotate_interleaved
from crossdock.models.cache import Decoding
from crossdock.models.deepseek.mla_kernel import rotated

ABSORB_N = 64  # tokens of a program


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


def _absorb_config(dtype: torch.dtype, nope: int, value: int, latent: int, half: int) -> dict[str, int]:
    """Sizes and tile; float32 has no matrix unit and needs registers for both operands."""
    wide = dtype == torch.float32
    sizes = {"U": nope, "V": value, "C": latent, "HALF": half}
    tile = {"BLOCK_C": 64 if wide else 128, "BLOCK_U": 16 if wide else 64, "BLOCK_HALF": next_power_of_2(half)}
    return sizes | {"BLOCK_N": ABSORB_N} | tile | {"num_warps": 4, "num_stages": 2}


def _audit(element: str, dtype: torch.dtype) -> KernelSpec:
    config = {"STRIDE_Q": 128 * 192, "INTERLEAVED": True, "WIDEN": False} | _absorb_config(dtype, 128, 128, 512, 32)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    kinds = dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32") | {"tokens_ptr": "*i32", "N": "i32"}
    kinds |= dict.fromkeys(("q_ptr", "weight_ptr", "out_ptr"), f"*{element}") | dict.fromkeys(config, "constexpr")
    return KernelSpec(
        name="absorb_queries",
        kernel=absorb_queries_kernel,
        config=f"{element}, 128 heads of 128 + 64, latent 512",
        signature={argument: kinds[argument] for argument in absorb_queries_kernel.arg_names},
        constexprs=config,
        num_warps=warps,
        num_stages=stages,
        needs_matrix_instruction=element != "fp32",
    )


AUDIT = [_audit(*each) for each in (("bf16", torch.bfloat16), ("fp32", torch.float32)) if HAS_TRITON]
