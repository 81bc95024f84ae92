# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The core of absorbed attention: all heads of a decoded token over the paged rows of its context, in one launch.

All heads attend to the same rows of latent and rotary key, so a program loads a tile of rows once for up to 64 heads,
and the same tile serves as keys (all of it) and as values (its latents). A program takes one portion of one token's
context (see `crossdock.models.cache`), walks it upward in tiles of fixed length with a running maximum, and writes the
portion's average and the logarithm of its weight; `expand_values` adds portions up in their order.

    context of a token    | tile tile tile tile | tile tile tile tile | tile ti |        rows found by the pages
    programs (heads)        portion 0             portion 1             portion 2        -> mean_WHC, lse_WH

So a token's bits depend on its own context alone: not on other sequences, nor on the tokens verified beside it, nor on
where its pages lie. Rejected: portions as long as the batch allows, which is what keeps a GPU busiest and what changes
bits with the company; several tokens of a sequence in one program, which would save reads while drafts are verified but
make a token's tile depend on their number.

Legend: N decoded tokens, W portions of their contexts, H heads, J context tokens (of a tile), C latent width, R rotary
width, X = C + R.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import HAS_TRITON, interpreting, tl, triton
from crossdock.gemm.configs import TARGETS, Limits, limits_of
from crossdock.gemm.tile_map import next_power_of_2
from crossdock.models.cache import Decoding

LOG2_E = 1.4426950408889634


def attend_latents_ref(
    q_NHX: Tensor, cache: Tensor, decoding: Decoding, latent: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The specification: -> each portion's average of latents [W, H, C] by softmax(scale * q . row), and the base-2
    logarithm of its sum of exponentials [W, H], both float32.

    `q_NHX` holds absorbed queries, `cache` is one layer, [rows, X], in their dtype.
    """
    means, logs = [], []
    size = decoding.page_size
    columns = (decoding.owner_W, decoding.sequence_W, decoding.start_W, decoding.stop_W)
    for owner, sequence, start, stop in zip(*(column.tolist() for column in columns), strict=True):
        at_J = torch.arange(start, stop, device=cache.device)
        rows_J = decoding.pages_SP[sequence].long()[at_J // size] * size + at_J % size
        row_JX = cache[rows_J].float()
        scores_HJ = scale * (q_NHX[owner].float() @ row_JX.T)
        means.append(scores_HJ.softmax(-1) @ row_JX[:, :latent])
        logs.append(scores_HJ.logsumexp(-1) * LOG2_E)
    return torch.stack(means), torch.stack(logs)


@triton.jit(do_not_specialize=["P"])
def attend_latents_kernel(
    q_ptr,  # [N, H, C + R] contiguous
    cache_ptr,  # [rows, C + R] contiguous
    pages_ptr,  # [S, P] int32
    owner_ptr,  # [W] int32, and the next three
    sequence_ptr,
    start_ptr,
    stop_ptr,
    mean_ptr,  # [W, H, C] float32 contiguous
    lse_ptr,  # [W, H] float32 contiguous
    P,
    scale,  # times log2(e)
    WIDEN: tl.constexpr,  # the interpreter multiplies bf16's bit patterns, so it gets float32
    PAGE: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    HEAD_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    portion = tl.program_id(0) // HEAD_BLOCKS  # those that read the same rows run side by side
    head_H = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    start, stop = tl.load(start_ptr + portion), tl.load(stop_ptr + portion)
    pages_ptr += tl.load(sequence_ptr + portion).to(tl.int64) * P
    c_C, r_R, j_J = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_J)
    q_row_H = tl.load(owner_ptr + portion).to(tl.int64) * H + tl.minimum(head_H, H - 1)
    q_ptrs = q_ptr + q_row_H[:, None] * (C + R)
    q_HC = tl.load(q_ptrs + c_C[None, :], mask=(c_C < C)[None, :], other=0.0)
    q_HR = tl.load(q_ptrs + C + r_R[None, :], mask=(r_R < R)[None, :], other=0.0)
    if WIDEN:
        q_HC, q_HR = q_HC.to(tl.float32), q_HR.to(tl.float32)
    top_H = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total_H = tl.zeros((BLOCK_H,), tl.float32)
    acc_HC = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    for at in range(start, stop, BLOCK_J):
        live_J = at + j_J < stop
        page_J = tl.load(pages_ptr + (at + j_J) // PAGE, mask=live_J, other=0)
        row_ptrs = cache_ptr + (page_J.to(tl.int64) * PAGE + (at + j_J) % PAGE)[:, None] * (C + R)
        row_JC = tl.load(row_ptrs + c_C[None, :], mask=live_J[:, None] & (c_C < C)[None, :], other=0.0)
        row_JR = tl.load(row_ptrs + C + r_R[None, :], mask=live_J[:, None] & (r_R < R)[None, :], other=0.0)
        if WIDEN:
            row_JC, row_JR = row_JC.to(tl.float32), row_JR.to(tl.float32)
        score_HJ = tl.dot(q_HC, tl.trans(row_JC), input_precision="ieee")
        score_HJ = tl.dot(q_HR, tl.trans(row_JR), score_HJ, input_precision="ieee")
        score_HJ = tl.where(live_J[None, :], score_HJ * scale, float("-inf"))
        new_H = tl.maximum(top_H, tl.max(score_HJ, 1))
        fade_H = tl.exp2(top_H - new_H)
        part_HJ = tl.exp2(score_HJ - new_H[:, None])
        total_H = total_H * fade_H + tl.sum(part_HJ, 1)
        part_HJ = part_HJ.to(cache_ptr.dtype.element_ty)
        if WIDEN:
            part_HJ = part_HJ.to(tl.float32)
        acc_HC = tl.dot(part_HJ, row_JC, acc_HC * fade_H[:, None], input_precision="ieee")
        top_H = new_H
    to_H = portion.to(tl.int64) * H + head_H
    mean_mask = (head_H < H)[:, None] & (c_C < C)[None, :]
    tl.store(mean_ptr + to_H[:, None] * C + c_C[None, :], acc_HC / total_H[:, None], mask=mean_mask)
    tl.store(lse_ptr + to_H, top_H + tl.log2(total_H), mask=head_H < H)


def attend_latents_triton(
    q_NHX: Tensor, cache: Tensor, decoding: Decoding, latent: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend_latents_ref` in one launch."""
    (_, heads, width), portions = q_NHX.shape, len(decoding.owner_W)
    mean_WHC = torch.empty((portions, heads, latent), dtype=torch.float32, device=cache.device)
    lse_WH = torch.empty((portions, heads), dtype=torch.float32, device=cache.device)
    config = _config(cache.dtype, heads, latent, width - latent, _limits(cache.device))
    attend_latents_kernel[(portions * -(-heads // config["BLOCK_H"]),)](
        q_NHX,
        cache,
        decoding.pages_SP,
        decoding.owner_W,
        decoding.sequence_W,
        decoding.start_W,
        decoding.stop_W,
        mean_WHC,
        lse_WH,
        decoding.pages_SP.shape[1],
        scale * LOG2_E,
        WIDEN=interpreting() and cache.dtype == torch.bfloat16,
        PAGE=decoding.page_size,
        **config,
    )
    return mean_WHC, lse_WH


@lru_cache
def _limits(device: torch.device) -> Limits:
    return TARGETS["sm_90"] if device.type == "cpu" else limits_of(device)


def _config(dtype: torch.dtype, heads: int, latent: int, width: int, limits: Limits) -> dict[str, int]:
    """Sizes and tile, by dtype, model and device alone.

    64 heads and their average fill the registers of eight warps, and queries with two tiles of rows the shared memory
    of sm_90. sm_100 keeps more of its operands there, AMD has 64 KB of it and spills with longer tiles, and smaller
    GPUs hold 16 heads. float32 runs without matrix units and needs registers for both operands.
    """
    sizes = {"H": heads, "C": latent, "R": width}
    sizes |= {"BLOCK_C": max(16, next_power_of_2(latent)), "BLOCK_R": max(16, next_power_of_2(width))}
    if dtype == torch.float32:
        return sizes | {"BLOCK_H": 16, "BLOCK_J": 16, "num_warps": 4 if limits.is_amd else 8, "num_stages": 1}
    block_h = min(64, max(16, next_power_of_2(heads)))
    if limits.is_amd:
        return sizes | {"BLOCK_H": block_h, "BLOCK_J": 16, "num_warps": 4, "num_stages": 1}
    if limits.shared_bytes < TARGETS["sm_90"].shared_bytes:
        block_h = 16
    block_j = 64 if limits.target == "sm_90" else 32
    return sizes | {"BLOCK_H": block_h, "BLOCK_J": block_j, "num_warps": 8, "num_stages": 3}  # pages, then rows


def _audit(element: str, dtype: torch.dtype, heads: int, target: str) -> KernelSpec:
    config: dict[str, Any] = _config(dtype, heads, 512, 64, TARGETS[target])
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    constexprs = {"WIDEN": False, "PAGE": 64} | config
    kinds = dict.fromkeys(("q_ptr", "cache_ptr"), f"*{element}") | dict.fromkeys(("mean_ptr", "lse_ptr"), "*fp32")
    kinds |= dict.fromkeys(("pages_ptr", "owner_ptr", "sequence_ptr", "start_ptr", "stop_ptr"), "*i32")
    kinds |= {"P": "i32", "scale": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    tile = f"tile {config['BLOCK_H']}x{config['BLOCK_J']} of {target}"
    return KernelSpec(
        name="attend_latents",
        kernel=attend_latents_kernel,
        config=f"{element}, {heads} heads, latent 512, rotary 64, {tile}",
        signature={name: kinds[name] for name in attend_latents_kernel.arg_names},
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        needs_matrix_instruction=dtype != torch.float32,
        targets=(target,),
    )


AUDIT = [
    _audit(element, dtype, heads, target)
    for element, dtype, heads in (
        ("bf16", torch.bfloat16, 128),
        ("bf16", torch.bfloat16, 32),
        ("bf16", torch.bfloat16, 16),
        ("fp32", torch.float32, 128),
    )
    for target in TARGETS
    if HAS_TRITON
]
