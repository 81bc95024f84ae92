# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""What MLA does between its first projection and the rest, in one launch: both norms, RoPE of the shared key, and the
write to the paged cache.

One row of `a_proj` holds all of it side by side; each part goes where it is wanted and nothing is copied twice:

    a_TX     | compressed query Q | latent C | key R |        (without compression: all heads' queries in place of Q)
               |                    |          rotate
               norm * weight        norm * weight
               v                    v          v
    q_TQ     | Q |        cache row | C        | R |

Two programs a token, one for the query and one for the cache row. A token's sums are taken inside one program, so its
bits do not depend on its company. Rejected: one program for both parts (they do not meet, and at decode there are more
multiprocessors than tokens).

Legend: T tokens, Q rank of the compressed query, C latent width, R rotary width of the key, X = Q + C + R.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.errors import ConfigError
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
) -> Tensor:
    """The specification: writes cache[rows_T] = (norm(latent), rotated key); -> queries [T, Q], normalised where
    `q_weight_Q` is given, else the columns of `a_TX` as they are.

    `cache` is one layer, [rows, C + R], `rope` is (cos, sin), float32 [T, 1, R / 2], `rows_T` int64.
    """
    latent, width = len(kv_weight_C), 2 * rope[0].shape[-1]
    q_TQ, latent_TC, key_TR = torch.split(a_TX, [a_TX.shape[1] - latent - width, latent, width], dim=-1)
    rotate = rotate_interleaved if interleaved else rotate_halves
    normal_TC = F.rms_norm(latent_TC, kv_weight_C.shape, kv_weight_C, eps)
    cache.index_copy_(0, rows_T, torch.cat((normal_TC, rotate(key_TR[:, None], rope)[:, 0]), dim=-1))
    return q_TQ if q_weight_Q is None else F.rms_norm(q_TQ, q_weight_Q.shape, q_weight_Q, eps)


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
    cache_ptr,  # [rows, C + R] contiguous
    eps,
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
        query = _normal(a_ptr, q_weight_ptr, eps, Q, q, q < Q)
        tl.store(q_ptr + token * Q + q, query.to(q_ptr.dtype.element_ty), mask=q < Q)


def prepare_latents_triton(
    a_TX: Tensor,
    q_weight_Q: Tensor | None,
    kv_weight_C: Tensor,
    rope: tuple[Tensor, Tensor],
    rows_T: Tensor,
    cache: Tensor,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """`prepare_latents_ref` in one launch. Raises ConfigError where the cache has another dtype than the rows."""
    if cache.dtype != a_TX.dtype:
        raise ConfigError(f"the cache must have the dtype of the model, {a_TX.dtype}, found {cache.dtype}")
    tokens, latent, half = len(a_TX), len(kv_weight_C), rope[0].shape[-1]
    rank = a_TX.shape[1] - latent - 2 * half
    a_TX = a_TX.contiguous()
    q_TQ = a_TX[:, :rank] if q_weight_Q is None else a_TX.new_empty(tokens, rank)
    if tokens == 0:
        return q_TQ
    prepare_latents_kernel[(tokens, 1 if q_weight_Q is None else 2)](
        a_TX,
        kv_weight_C if q_weight_Q is None else q_weight_Q,
        kv_weight_C,
        rope[0],
        rope[1],
        rows_T,
        q_TQ,
        cache,
        eps,
        INTERLEAVED=interleaved,
        **_sizes(rank, latent, half, q_weight_Q is not None),
        num_warps=WARPS,
    )
    return q_TQ


def _sizes(rank: int, latent: int, half: int, compressed: bool) -> dict[str, int]:
    """The kernel's sizes and the powers of two that hold them; a query that is not compressed needs none."""
    blocks = {
        "BLOCK_Q": next_power_of_2(rank) if compressed else 1,
        "BLOCK_C": next_power_of_2(latent),
        "BLOCK_HALF": next_power_of_2(half),
    }
    return {"Q": rank, "C": latent, "HALF": half} | blocks


_ORDER = ("Q", "C", "HALF", "INTERLEAVED", "BLOCK_Q", "BLOCK_C", "BLOCK_HALF")


def _audit(element: str, rank: int, compressed: bool) -> KernelSpec:
    constexprs = {"INTERLEAVED": True} | _sizes(rank, 512, 32, compressed)
    floats = dict.fromkeys(("a_ptr", "q_weight_ptr", "kv_weight_ptr"), f"*{element}")
    tables = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "rows_ptr": "*i64"}
    outputs = {"q_ptr": f"*{element}", "cache_ptr": f"*{element}", "eps": "fp32"}
    return KernelSpec(
        name="prepare_latents",
        kernel=prepare_latents_kernel,
        config=f"{element}, {'compressed' if compressed else 'plain'} query of {rank}, latent 512, rotary 64",
        signature=floats | tables | outputs | dict.fromkeys(_ORDER, "constexpr"),
        constexprs=constexprs,
        num_warps=WARPS,
    )


AUDIT = [_audit("bf16", 1536, True), _audit("fp32", 1536, True), _audit("bf16", 3072, False)]
