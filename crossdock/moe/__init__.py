"""The MoE layer: routing, exchange and grouped GEMMs composed."""

from crossdock.moe.config import ExchangeConfig, MoEConfig
from crossdock.moe.experts import Experts, Fp8Experts, Fp8RowExperts, PackedExperts, make_experts
from crossdock.moe.gradients import sum_replicated_gradients
from crossdock.moe.layer import MoELayer
from crossdock.moe.mlp import GatedMLP, SwigluMLP
from crossdock.moe.reference import moe_ref
from crossdock.moe.survive import go_on
from crossdock.moe.trace import traced
from crossdock.moe.two_batch import interleave

__all__ = [
    "ExchangeConfig",
    "Experts",
    "Fp8Experts",
    "Fp8RowExperts",
    "GatedMLP",
    "MoEConfig",
    "MoELayer",
    "PackedExperts",
    "SwigluMLP",
    "go_on",
    "interleave",
    "make_experts",
    "moe_ref",
    "sum_replicated_gradients",
    "traced",
]
