# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""What MLA does between its first projection and the rest, in one launch: both norms, RoPE of the shared key, and the
write to the paged cache.

One row of `a_proj` holds all of it side by side; each part goes where it is wanted and nothing is copied twice:

    a_TX     | compressed query Q | latent C | key R |        (without compression: all heads' queries in place of Q)
               |                    |          rotate
               norm * weight        norm * weight
               v                    v          v
    q_TQ     | Q |        cache row | C        | R |

Where the product that reads the query is in FP8, the query leaves as codes and scales per 1x128, those that
`quantize_rows` would give of it.

Two programs a token, one for the query and one for the cache row. A token's sums are taken inside one program, so its
bits do not depend on its company. Rejected: one program for both parts (they do not meet, and at decode there are more
multiprocessors than tokens).

Legend: T tokens, Q rank of the compressed query, B blocks of 128 of it, C latent width, R rotary width of the key,
X = Q + C + R.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import HAS_TRITON, interpreting, tl, triton
from crossdock.errors import ConfigError
from crossdock.gemm import BLOCK, E4M3_MAX, QuantSpec, Rows
from crossdock.gemm.quantize_kernel import MIN_SCALE, quantize_rows_ref, quantize_strips
from crossdock.gemm.tile_map import next_power_of_2
from crossdock.models.blocks import rotate_halves, rotate_interleaved

WARPS = 4


def prepare_latents_ref(
    a_TX: Tensor,
    q_weight_Q: Tensor | None,
    kv_weight_C: Tensor,
    rope: tuple[Tensor, Tensor],
    rows_T: Tensor,
    cache: Tensor,
    eps: float,
    interleaved: bool,
    quant: QuantSpec | None = None,
) -> Rows:
    """The specification: writes cache[rows_T] = (norm(latent), rotated key); -> queries [T, Q], normalised where
    `q_weight_Q` is given, else the columns of `a_TX` as they are; with `quant` their codes and scales.

    `cache` is one layer, [rows, C + R], `rope` is (cos, sin), float32 [T, 1, R / 2], `rows_T` int64.
    """
    latent, width = len(kv_weight_C), 2 * rope[0].shape[-1]
    q_TQ, latent_TC, key_TR = torch.split(a_TX, [a_TX.shape[1] - latent - width, latent, width], dim=-1)
    rotate = rotate_interleaved if interleaved else rotate_halves
    normal_TC = F.rms_norm(latent_TC, kv_weight_C.shape, kv_weight_C, eps)
    cache.index_copy_(0, rows_T, torch.cat((normal_TC, rotate(key_TR[:, None], rope)[:, 0]), dim=-1))
    q_TQ = q_TQ if q_weight_Q is None else F.rms_norm(q_TQ, q_weight_Q.shape, q_weight_Q, eps)
    return q_TQ if quant is None else quantize_rows_ref(q_TQ, quant.pow2_scales)


@triton.jit
def rotated(x_ptrs, cos_ptrs, sin_ptrs, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, at):
    """Pair `at` of each rotary part that starts at `x_ptrs`, turned: (first elements, second elements) in float32.

    INTERLEAVED pairs are (0, 1), (2, 3), ..., the others (i, i + HALF).
    """
    a = tl.load(x_ptrs + (2 * at if INTERLEAVED else at), mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptrs + (2 * at + 1 if INTERLEAVED else at + HALF), mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptrs + at, mask=mask, other=0.0)
    sin = tl.load(sin_ptrs + at, mask=mask, other=0.0)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _normal(x_ptr, weight_ptr, eps, SIZE: tl.constexpr, at, mask):
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x) / SIZE + eps) * weight


@triton.jit
def prepare_latents_kernel(
    a_ptr,  # [T, Q + C + R] contiguous
    q_weight_ptr,  # [Q]
    kv_weight_ptr,  # [C]
    cos_ptr,  # [T, HALF] float32 contiguous
    sin_ptr,
    rows_ptr,  # [T] int64
    q_ptr,  # [T, Q] contiguous
    scale_ptr,  # [T, B] contiguous, written only where QUANTIZE
    cache_ptr,  # [rows, C + R] contiguous
    eps,
    QUANTIZE: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    POW2: tl.constexpr,
    PRE_ROUND: tl.constexpr,
    STRIP: tl.constexpr,  # 128
    Q: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,  # R / 2
    INTERLEAVED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program (t, 0) writes token t's cache row; program (t, 1), which runs where queries are compressed, its query."""
    token = tl.program_id(0).to(tl.int64)
    a_ptr += token * (Q + C + 2 * HALF)
    if tl.program_id(1) == 0:
        c = tl.arange(0, BLOCK_C)
        to_ptr = cache_ptr + tl.load(rows_ptr + token) * (C + 2 * HALF)
        latent = _normal(a_ptr + Q, kv_weight_ptr, eps, C, c, c < C)
        tl.store(to_ptr + c, latent.to(cache_ptr.dtype.element_ty), mask=c < C)
        r = tl.arange(0, BLOCK_HALF)
        cos_ptr += token * HALF
        sin_ptr += token * HALF
        first, second = rotated(a_ptr + Q + C, cos_ptr, sin_ptr, r < HALF, HALF, INTERLEAVED, r)
        tl.store(to_ptr + C + r, first.to(cache_ptr.dtype.element_ty), mask=r < HALF)
        tl.store(to_ptr + C + HALF + r, second.to(cache_ptr.dtype.element_ty), mask=r < HALF)
    else:
        q = tl.arange(0, BLOCK_Q)
        query = _normal(a_ptr, q_weight_ptr, eps, Q, q, q < Q).to(a_ptr.dtype.element_ty)
        if QUANTIZE:
            STRIPS: tl.constexpr = BLOCK_Q // STRIP
            strip_SC = tl.reshape(query.to(tl.float32), (STRIPS, STRIP))
            codes_SC, scale_S = quantize_strips(strip_SC, E4M3_MAX, MIN_SCALE, POW2, PRE_ROUND)
            strip_S = tl.arange(0, STRIPS)
            at_SC = strip_S[:, None] * STRIP + tl.arange(0, STRIP)[None, :]
            tl.store(q_ptr + token * Q + at_SC, codes_SC.to(q_ptr.dtype.element_ty), mask=at_SC < Q)
            blocks: tl.constexpr = (Q + STRIP - 1) // STRIP
            tl.store(scale_ptr + token * blocks + strip_S, scale_S, mask=strip_S < blocks)
        else:
            tl.store(q_ptr + token * Q + q, query, mask=q < Q)


def prepare_latents_triton(
    a_TX: Tensor,
    q_weight_Q: Tensor | None,
    kv_weight_C: Tensor,
    rope: tuple[Tensor, Tensor],
    rows_T: Tensor,
    cache: Tensor,
    eps: float,
    interleaved: bool,
    quant: QuantSpec | None = None,
) -> Rows:
    """`prepare_latents_ref` in one launch. Raises ConfigError where the cache has another dtype than the rows.

    `quant` is for queries that are compressed.
    """
    if cache.dtype != a_TX.dtype:
        raise ConfigError(f"the cache must have the dtype of the model, {a_TX.dtype}, found {cache.dtype}")
    tokens, latent, half = len(a_TX), len(kv_weight_C), rope[0].shape[-1]
    rank = a_TX.shape[1] - latent - 2 * half
    a_TX = a_TX.contiguous()
    q_TQ, scale_TB = a_TX[:, :rank], None
    if quant is not None:
        q_TQ = torch.empty(tokens, rank, dtype=torch.float8_e4m3fn, device=a_TX.device)
        scale_TB = torch.empty(tokens, -(-rank // BLOCK), dtype=torch.float32, device=a_TX.device)
    elif q_weight_Q is not None:
        q_TQ = a_TX.new_empty(tokens, rank)
    out = q_TQ if scale_TB is None else (q_TQ, scale_TB)
    if tokens == 0:
        return out
    prepare_latents_kernel[(tokens, 1 if q_weight_Q is None else 2)](
        a_TX,
        kv_weight_C if q_weight_Q is None else q_weight_Q,
        kv_weight_C,
        rope[0],
        rope[1],
        rows_T,
        q_TQ,
        q_TQ if scale_TB is None else scale_TB,
        cache,
        eps,
        **quantize_flags(quant, interpreting()),
        INTERLEAVED=interleaved,
        **_sizes(rank, latent, half, q_weight_Q is not None),
        num_warps=WARPS,
    )
    return out


def quantize_flags(quant: QuantSpec | None, pre_round: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel that quantises what it gives, where `quant` asks for it."""
    given = {"QUANTIZE": quant is not None, "POW2": quant is not None and quant.pow2_scales, "PRE_ROUND": pre_round}
    return given | {"E4M3_MAX": E4M3_MAX, "MIN_SCALE": MIN_SCALE, "STRIP": BLOCK}


def _sizes(rank: int, latent: int, half: int, compressed: bool) -> dict[str, int]:
    """The kernel's sizes and the powers of two that hold them; a query that is not compressed needs none."""
    blocks = {
        "BLOCK_Q": next_power_of_2(max(rank, BLOCK)) if compressed else 1,
        "BLOCK_C": next_power_of_2(latent),
        "BLOCK_HALF": next_power_of_2(half),
    }
    return {"Q": rank, "C": latent, "HALF": half} | blocks


def _audit(element: str, rank: int, compressed: bool, quant: QuantSpec | None = None) -> KernelSpec:
    constexprs = quantize_flags(quant, False) | {"INTERLEAVED": True} | _sizes(rank, 512, 32, compressed)
    kinds = dict.fromkeys(("a_ptr", "q_weight_ptr", "kv_weight_ptr", "q_ptr", "cache_ptr", "scale_ptr"), f"*{element}")
    kinds |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "rows_ptr": "*i64", "eps": "fp32"}
    kinds |= {} if quant is None else {"q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    query = f"{'compressed' if compressed else 'plain'} query of {rank}{'' if quant is None else ' quantised'}"
    return KernelSpec(
        name="prepare_latents",
        kernel=prepare_latents_kernel,
        config=f"{element}, {query}, latent 512, rotary 64",
        signature={name: kinds[name] for name in prepare_latents_kernel.arg_names},
        constexprs=constexprs,
        num_warps=WARPS,
    )


AUDIT = [
    _audit(element, rank, compressed, quant)
    for element, rank, compressed, quant in (
        ("bf16", 1536, True, None),
        ("bf16", 1536, True, QuantSpec("fp8_block")),
        ("fp32", 1536, True, None),
        ("bf16", 3072, False, None),
    )
    if HAS_TRITON
]
