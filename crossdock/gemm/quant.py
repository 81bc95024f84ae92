"""FP8 e4m3: one scale per 128 (activations in 1x128 strips of a row, weights in 128x128 blocks), or one per row.

The scheme of blocks is DeepSeek-V3's (technical report, section 3.3.2); its checkpoints say so with
`"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}` and store a weight's scales beside it
as `weight_scale_inv`. Here and there a scale is the multiplier: value = code * scale, with scale = amax / 448.

    x [R, K = 300]      | 128 columns | 128 columns | 44 |      -> 3 scales a row
    w [N = 200, K]      128 rows and the last 72, the same 3 columns of blocks -> [2, 3] scales

With one scale per row (of activations, and of a weight: then it is an output column's) the scales leave the sum as a
factor, which is what vendors' libraries multiply; a large value in a row costs that whole row its precision.

What does not fit: a strip, block or row that holds a NaN or an infinity gets scale NaN and codes 0, so that all of it
dequantises to NaN and nothing else does. Zeros get a tiny scale and come back as zeros.

Legend: R rows, N and K the sizes of a weight, B blocks of 128 along K.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_dtype, check_rank, check_same_device, check_shape
from crossdock.gemm.quantize_kernel import (
    BLOCK,
    E4M3_MAX,
    encode,
    quantize_rows_ref,
    quantize_rows_triton,
    quantize_whole_rows_ref,
    quantize_whole_rows_triton,
    scale_of,
    spread,
)

__all__ = [
    "BLOCK",
    "E4M3_MAX",
    "QuantSpec",
    "dequantize_blocks",
    "dequantize_rows",
    "dequantize_whole_rows",
    "quantize_blocks",
    "quantize_rows",
    "quantize_whole_rows",
]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class QuantSpec:
    """How expert weights are held and multiplied: one value in place of a row of booleans.

    kind         "none": as they are, in the model's dtype
                 "fp8_block": e4m3 in 128x128 blocks, activations quantised per 1x128 before each product
                 "fp8_row": e4m3 with one scale an output column, activations with one a row
    pow2_scales  activation scales rounded up to powers of two, so that scaling changes no mantissa (needed where
                 scales are later stored as exponents alone, `"scale_fmt": "ue8m0"` in a checkpoint's config)

    Raises ConfigError for any other kind, and for pow2_scales where nothing is quantised.
    """

    kind: Literal["none", "fp8_block", "fp8_row"] = "none"
    pow2_scales: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("none", "fp8_block", "fp8_row"):
            raise ConfigError(f"QuantSpec.kind must be 'none', 'fp8_block' or 'fp8_row', found {self.kind!r}")
        if self.pow2_scales and self.kind == "none":
            raise ConfigError("QuantSpec.pow2_scales is set, but kind 'none' has no scales")


def quantize_rows(x_RK: Tensor, *, pow2: bool = False, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Rows in 1x128 strips: [R, K] bf16, fp16 or fp32 -> (codes [R, K] e4m3, scales [R, ceil(K / 128)] float32).

    `pow2` rounds scales up to powers of two. The last strip of a row may be short. Backends agree to the bit. Not
    differentiable. Raises ConfigError for another rank or dtype, or a backend that cannot run here.
    """
    check_rank("x_RK", x_RK, "R, K")
    check_dtype("x_RK", x_RK, FLOATS, "what can be quantised")
    if resolve_backend(backend, x_RK.device) == "triton":
        return quantize_rows_triton(x_RK.detach(), pow2)
    return quantize_rows_ref(x_RK.detach(), pow2)


def quantize_blocks(w_NK: Tensor, *, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """Weights in 128x128 blocks: [..., N, K] -> (codes [..., N, K] e4m3, scales [..., ceil(N/128), ceil(K/128)] fp32).

    Torch only, on every device: weights are quantised once, before anything runs. The last blocks may be short. Not
    differentiable. Raises ConfigError for fewer than two dimensions or another dtype than bf16, fp16, fp32.
    """
    if w_NK.dim() < 2:
        raise ConfigError(f"w_NK must have at least 2 dimensions [..., N, K], found shape {tuple(w_NK.shape)}")
    check_dtype("w_NK", w_NK, FLOATS, "what can be quantised")
    rows, cols = w_NK.shape[-2:]
    padded = F.pad(w_NK.detach().float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.reshape(*w_NK.shape[:-2], -(-rows // BLOCK), BLOCK, -(-cols // BLOCK), BLOCK)
    scale = scale_of(blocks.abs().amax((-1, -3)), pow2)
    codes = encode(blocks, scale[..., :, None, :, None])
    return codes.reshape(padded.shape)[..., :rows, :cols].contiguous(), scale


def dequantize_rows(q_RK: Tensor, scale_RB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantize_rows`: codes [R, K] e4m3, scales [R, ceil(K / 128)] float32 -> [R, K] in `dtype`.

    Multiplies in float32, then rounds once. Raises ConfigError where shapes, dtypes or devices do not fit.
    """
    check_rank("q_RK", q_RK, "R, K")
    check_codes("q_RK", q_RK, "scale_RB", scale_RB, (q_RK.shape[0], -(-q_RK.shape[1] // BLOCK)))
    return (q_RK.float() * spread(scale_RB, q_RK.shape[1], -1)).to(dtype)


def quantize_whole_rows(x_RK: Tensor, *, pow2: bool = False, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """One scale a row: [..., K] bf16, fp16 or fp32 -> (codes [..., K] e4m3, scales [...] float32).

    For activations [R, K], and for weights [L, N, K], whose rows are output columns. `pow2` rounds scales up to powers
    of two. Backends agree to the bit. Not differentiable. Raises ConfigError for a scalar, another dtype, or a backend
    that cannot run here.
    """
    if x_RK.dim() == 0:
        raise ConfigError("x_RK must have at least 1 dimension [..., K], found shape ()")
    check_dtype("x_RK", x_RK, FLOATS, "what can be quantised")
    rows = x_RK.detach().reshape(x_RK.shape[:-1].numel(), x_RK.shape[-1])
    on_triton = resolve_backend(backend, x_RK.device) == "triton"
    codes, scale = (quantize_whole_rows_triton if on_triton else quantize_whole_rows_ref)(rows, pow2)
    return codes.view(x_RK.shape), scale.view(x_RK.shape[:-1])


def dequantize_whole_rows(q_RK: Tensor, scale_R: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantize_whole_rows`: codes [..., K] e4m3, scales [...] float32 -> [..., K] in `dtype`.

    Multiplies in float32, then rounds once. Raises ConfigError where shapes, dtypes or devices do not fit.
    """
    check_codes("q_RK", q_RK, "scale_R", scale_R, tuple(q_RK.shape[:-1]), "row")
    return (q_RK.float() * scale_R[..., None]).to(dtype)


def dequantize_blocks(q_NK: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantize_blocks`: codes [..., N, K], scales [..., ceil(N/128), ceil(K/128)] -> [..., N, K].

    Multiplies in float32, then rounds once to `dtype`. Raises ConfigError where shapes, dtypes or devices do not fit.
    """
    if q_NK.dim() < 2:
        raise ConfigError(f"q_NK must have at least 2 dimensions [..., N, K], found shape {tuple(q_NK.shape)}")
    *lead, rows, cols = q_NK.shape
    check_codes("q_NK", q_NK, "scale", scale, (*lead, -(-rows // BLOCK), -(-cols // BLOCK)))
    return (q_NK.float() * spread(spread(scale, cols, -1), rows, -2)).to(dtype)


def check_codes(
    name: str, codes: Tensor, scale_name: str, scale: Tensor, shape: tuple[int, ...], per: str = str(BLOCK)
) -> None:
    """Raises ConfigError unless codes are e4m3 and their scales float32, of `shape` and on the same device.

    `per` says what shares a scale.
    """
    check_dtype(name, codes, (torch.float8_e4m3fn,), "codes of this package's quantisation")
    check_dtype(scale_name, scale, (torch.float32,), "scales are multiplied in float32")
    check_shape(scale_name, scale, shape, f"one scale per {per} of {name}'s {tuple(codes.shape)}")
    check_same_device(name, codes, (scale_name, scale))
