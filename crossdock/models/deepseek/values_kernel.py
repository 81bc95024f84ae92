# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""What follows absorbed attention: the means of a context's portions added up, and W_UV behind their sum.

    means of portions [W, H, C] --each by its share of the softmax, in the context's order--> latent [H, C] of a token
                                --W_UV, a small matrix a head--> values [H * V] (--> codes and scales)

A program takes one head and a few tokens, as in `absorbed_kernel`. Adding up here saves a launch and a round trip of
float32 latents. Where o_proj is in FP8 and a head has 128 values, which is a strip of one scale, the values leave
quantised: another launch less.

Legend: T flat tokens of the step, N decoded ones among them, W portions of their contexts, H heads, U nope width of a
head, V its value width, C latent width, X = H * V, B its blocks of 128, P portions a program adds at once.
"""

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import HAS_TRITON, interpreting, tl, triton
from crossdock.gemm import BLOCK, QuantSpec
from crossdock.gemm.quantize_kernel import quantize_rows_ref, quantize_strips
from crossdock.gemm.tile_map import next_power_of_2
from crossdock.models.cache import Decoding
from crossdock.models.deepseek.mla_kernel import quantize_flags

TOKENS = 16  # of a program


def can_quantize_values(value: int) -> bool:
    """Whether `expand_values` can quantise: a program's values are those that share a scale."""
    return value == BLOCK


def expand_values_ref(
    mean_WHC: Tensor,
    lse_WH: Tensor,
    weight: Tensor,
    decoding: Decoding,
    nope: int,
    out_TX: Tensor,
    scale_TB: Tensor | None = None,
    quant: QuantSpec | None = None,
) -> None:
    """The specification: writes out_TX[t] [H * V] = W_UV times the average latent, for each decoded token.

    `mean_WHC` and `lse_WH` are what `attend_latents` gives. With `quant` `out_TX` gets the codes of that, rounded to
    the weight's dtype, and `scale_TB` the scales.
    """
    heads, latent = mean_WHC.shape[1:]
    w_HVC = weight.view(heads, -1, latent)[:, nope:]
    bounds = decoding.first_N1.tolist()
    for token, first, last in zip(decoding.tokens_N.tolist(), bounds[:-1], bounds[1:], strict=True):
        share_WH = (lse_WH[first:last].double() * torch.log(torch.tensor(2.0))).softmax(0).float()
        mean_HC = (share_WH[..., None] * mean_WHC[first:last]).sum(0).to(weight.dtype)
        values_X = torch.einsum("hc,hvc->hv", mean_HC.float(), w_HVC.float()).flatten()
        if quant is None or scale_TB is None:
            out_TX[token] = values_X
        else:
            (out_TX[token],), (scale_TB[token],) = quantize_rows_ref(values_X[None].to(weight.dtype), quant.pow2_scales)


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
    scale_ptr,  # [T, H] contiguous, written only where QUANTIZE, which needs V = 128
    N,
    WIDEN: tl.constexpr,
    QUANTIZE: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    POW2: tl.constexpr,
    PRE_ROUND: tl.constexpr,
    STRIP: tl.constexpr,  # 128
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
    if QUANTIZE:
        acc_NV = acc_NV.to(weight_ptr.dtype.element_ty).to(tl.float32)
        acc_NV, scale_N = quantize_strips(acc_NV, E4M3_MAX, MIN_SCALE, POW2, PRE_ROUND)
        tl.store(scale_ptr + token_N * heads + head, scale_N, mask=n_N < N)
    tl.store(to_ptrs, acc_NV.to(out_ptr.dtype.element_ty), mask=(n_N < N)[:, None] & (v_V < V)[None, :])


def expand_values_triton(
    mean_WHC: Tensor,
    lse_WH: Tensor,
    weight: Tensor,
    decoding: Decoding,
    nope: int,
    out_TX: Tensor,
    scale_TB: Tensor | None = None,
    quant: QuantSpec | None = None,
) -> None:
    """`expand_values_ref` in one launch; `out_TX` and `scale_TB` are contiguous, heads of `quant` have 128 values."""
    count, (heads, latent) = len(decoding.tokens_N), mean_WHC.shape[1:]
    value = weight.shape[0] // heads - nope
    assert quant is None or can_quantize_values(value), "a program's values must be those that share a scale"
    expand_values_kernel[(-(-count // TOKENS), heads)](
        mean_WHC,
        lse_WH,
        weight,
        decoding.tokens_N,
        decoding.first_N1,
        out_TX,
        out_TX if scale_TB is None else scale_TB,
        count,
        WIDEN=interpreting() and weight.dtype == torch.bfloat16,
        **quantize_flags(quant, interpreting()),
        **_config(weight.dtype, nope, value, latent),
    )


def _config(dtype: torch.dtype, nope: int, value: int, latent: int) -> dict[str, int]:
    """Sizes and tile: registers hold portions in flight."""
    sizes = {"U": nope, "V": value, "C": latent}
    tile = {"BLOCK_P": 8, "BLOCK_C": 16 if dtype == torch.float32 else 64, "BLOCK_V": max(16, next_power_of_2(value))}
    return sizes | {"BLOCK_N": TOKENS} | tile | {"num_warps": 8, "num_stages": 2}


def _audit(element: str, dtype: torch.dtype, quant: QuantSpec | None = None) -> KernelSpec:
    config = {"WIDEN": False} | quantize_flags(quant, False) | _config(dtype, 128, 128, 512)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    kinds = dict.fromkeys(("mean_ptr", "lse_ptr"), "*fp32") | {"tokens_ptr": "*i32", "first_ptr": "*i32", "N": "i32"}
    kinds |= dict.fromkeys(("weight_ptr", "out_ptr", "scale_ptr"), f"*{element}") | dict.fromkeys(config, "constexpr")
    kinds |= {} if quant is None else {"out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    return KernelSpec(
        name="expand_values",
        kernel=expand_values_kernel,
        config=f"{element}, 128 heads of 128 + 64, latent 512{'' if quant is None else ', quantised'}",
        signature={argument: kinds[argument] for argument in expand_values_kernel.arg_names},
        constexprs=config,
        num_warps=warps,
        num_stages=stages,
        needs_matrix_instruction=element != "fp32" and quant is None,  # it is not FP8 that is multiplied
    )


AUDIT = [
    _audit(element, dtype, quant)
    for element, dtype, quant in (
        ("bf16", torch.bfloat16, None),
        ("bf16", torch.bfloat16, QuantSpec("fp8_block")),
        ("fp32", torch.float32, None),
    )
    if HAS_TRITON
]
