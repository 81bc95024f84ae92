"""Blocks both model families share: normalisation, projection, rotary embedding, and how configs spell rotary options.

Legend: T tokens, D hidden, H heads, R rotary width of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.backend import Backend
from crossdock.errors import ConfigError
from crossdock.gemm import BLOCK, QuantSpec, Rows, linear_fp8
from crossdock.linear import linear, pack
from crossdock.memory import use_huge_pages
from crossdock.models.fields import Fields
from crossdock.moe import MoELayer, SwigluMLP


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in fp32; x's dtype out."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Module):
    """A projection whose rows do not depend on their company; weight [out, in] and, where asked, bias [out].

    `is_read` says that others read the weight too, so that it has to stay as it is.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
        device: torch.device,
        bias: bool = False,
        is_read: bool = False,
    ) -> None:
        super().__init__()
        self.is_read = is_read
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=device)) if bias else None

    def pack(self) -> None:
        """Lays the weight out for inference on this device once and for all; the bits stay the same."""
        if not self.is_read:
            self.weight = nn.Parameter(pack(self.weight.data), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self.weight, self.bias)


class Fp8Linear(nn.Module):
    """The same with an e4m3 weight in 128x128 blocks, multiplied in FP8 with rows quantised per 1x128.

    For inference only: the weight and its fp32 scales are buffers.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        quant: QuantSpec,
        dtype: torch.dtype,
        device: torch.device,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.dtype, self.quant = dtype, quant
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.float8_e4m3fn, device=device))
        shape = -(-outputs // BLOCK), -(-inputs // BLOCK)
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Rows) -> Tensor:
        """[T, in], or codes and scales of that -> [T, out] in the model's dtype."""
        y_TD = linear_fp8(
            x, self.weight, self.scale, pow2=self.quant.pow2_scales, out_dtype=self.dtype, backend=self.backend
        )
        return y_TD if self.bias is None else y_TD + self.bias


def make_linear(
    inputs: int,
    outputs: int,
    quant: QuantSpec,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool = False,
    backend: Backend = "auto",
) -> Linear | Fp8Linear:
    """A projection held as `quant` asks for."""
    if quant.kind == "fp8_block":
        return Fp8Linear(inputs, outputs, quant, dtype, device, bias, backend)
    return Linear(inputs, outputs, dtype, device, bias)


def quant_of(projection: nn.Module | None) -> QuantSpec | None:
    """How a projection may be given its rows quantised, None for not at all."""
    return projection.quant if isinstance(projection, Fp8Linear) else None


def pack_weights(model: nn.Module) -> None:
    """Lays all weights out for inference on their device, one after another; the model cannot be trained after that."""
    for module in model.modules():
        if isinstance(module, (Linear, SwigluMLP, MoELayer)):
            module.pack()
    use_huge_pages(model.parameters())


@dataclass(frozen=True)
class RopeConfig:
    """Rotary options: width R, base theta, and YaRN's (arXiv:2309.00071) where `factor` is above 1."""

    width: int
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, fields: Fields, width: int) -> "RopeConfig":
        """Reads `rope_parameters`, or `rope_theta` with `rope_scaling`; ConfigError for a rope type not known here."""
        if width < 2 or width % 2:
            raise ConfigError(f"config.json: the rotary width of a head must be even and at least 2, found {width}")
        rope = fields.section("rope_parameters", "rope_scaling")
        theta = (rope if rope.has("rope_theta") else fields).number("rope_theta", above=1.0, default=10000.0)
        if rope.choice("rope_type", "type", among=("default", "yarn"), default="default") == "default":
            return cls(width, theta)
        context = fields.integer("max_position_embeddings")
        original = rope.integer("original_max_position_embeddings", default=context)
        return cls(
            width,
            theta,
            factor=rope.number("factor", minimum=1.0, default=context / original),
            original_length=original,
            beta_fast=rope.number("beta_fast", above=0.0, default=32.0),
            beta_slow=rope.number("beta_slow", above=0.0, default=1.0),
            mscale=rope.number("mscale", default=0.0),
            mscale_all_dim=rope.number("mscale_all_dim", default=0.0),
            attention_factor=rope.number("attention_factor", above=0.0) if rope.has("attention_factor") else None,
            truncate=rope.boolean("truncate", True),
        )

    def magnitude(self, mscale: float) -> float:
        """YaRN's growth of attention with the context's: 0.1 mscale ln(factor) + 1."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def table_scale(self) -> float:
        """The factor on cos and sin."""
        if self.factor <= 1:
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    def frequencies(self) -> Tensor:
        """fp32 [R / 2]: theta^(-2i/R), under YaRN blended with its `factor`th part from fast to slow dimensions."""
        powers = self.theta ** (torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)
        if self.factor <= 1:
            return 1.0 / powers
        low, high = self._dimension(self.beta_fast), self._dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.width - 1)
        ramp = (torch.arange(self.width // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
        keep = 1 - ramp.clamp(0, 1)
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep

    def _dimension(self, rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        turns = self.original_length / (rotations * 2 * math.pi)
        return self.width * math.log(turns) / (2 * math.log(self.theta))


class Rotary(nn.Module):
    """cos and sin of the positions, computed once a step and shared by all layers."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        super().__init__()
        self.scale = config.table_scale
        self.frequencies: Tensor
        self.register_buffer("frequencies", config.frequencies().to(device), persistent=False)

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] -> (cos, sin), fp32 [T, 1, R / 2], to broadcast over heads."""
        angles = (positions_T.float()[:, None] * self.frequencies)[:, None, :].double()
        cos, sin = angles.cos().float(), angles.sin().float()  # by float64: see crossdock.linear on rows in company
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)


def rotate_interleaved(x_THR: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (0, 1), (2, 3), ... (DeepSeek); the result holds first elements, then second ones."""
    cos, sin = rope
    a, b = x_THR[..., 0::2], x_THR[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_THR.dtype)


def rotate_halves(x_THR: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + R/2) (Qwen)."""
    cos, sin = rope
    a, b = x_THR.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_THR.dtype)
