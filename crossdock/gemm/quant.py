"""FP8 e4m3 with one scale per 128: rows in 1x128 strips, weights in 128x128 blocks.

Legend: R rows, N, K a matrix's sizes, B blocks of 128.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.backend import Backend

BLOCK = 128
E4M3_MAX = 448.0


@dataclass(frozen=True)
class QuantSpec:
    kind: Literal["none", "fp8_block", "fp8_row"] = "none"
    pow2_scales: bool = False


def _scale(amax: Tensor, pow2: bool) -> Tensor:
    scale = (amax / E4M3_MAX).clamp(min=2.0**-126)
    if pow2:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return scale


def quantize_rows(x_RK: Tensor, *, pow2: bool = False, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """-> q [R, K] e4m3, scale [R, B]."""
    rows, inner = x_RK.shape
    x_RBb = F.pad(x_RK.float(), (0, -inner % BLOCK)).view(rows, -1, BLOCK)
    scale_RB = _scale(x_RBb.abs().amax(-1), pow2)
    q = (x_RBb / scale_RB[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return q.view(rows, -1)[:, :inner].contiguous(), scale_RB


def quantize_blocks(w_NK: Tensor, *, pow2: bool = False, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """[..., N, K] -> q [..., N, K] e4m3, scale [..., ceil(N / 128), ceil(K / 128)]."""
    *lead, n, k = w_NK.shape
    w = F.pad(w_NK.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = w.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = _scale(blocks.abs().amax((-1, -3)), pow2)
    q = (w / _spread(scale, w.shape[-2], w.shape[-1])).clamp(-E4M3_MAX, E4M3_MAX)
    return q[..., :n, :k].to(torch.float8_e4m3fn).contiguous(), scale


def _spread(scale: Tensor, n: int, k: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, -1)[..., :k].repeat_interleave(BLOCK, -2)[..., :n, :]


def dequantize_rows(q_RK: Tensor, scale_RB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> [R, K] in `dtype`."""
    return (q_RK.float() * scale_RB.repeat_interleave(BLOCK, -1)[:, : q_RK.shape[1]]).to(dtype)


def dequantize_blocks(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> [..., N, K] in `dtype`."""
    return (q.float() * _spread(scale, q.shape[-2], q.shape[-1])).to(dtype)
