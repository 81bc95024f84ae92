"""What a Qwen3-MoE or Qwen2-MoE `config.json` says."""

from dataclasses import dataclass
from typing import Any

from crossdock.errors import ConfigError
from crossdock.gemm import QuantSpec
from crossdock.models.blocks import RopeConfig
from crossdock.models.fields import Fields
from crossdock.moe import MoEConfig

MODEL_TYPES = ("qwen3_moe", "qwen2_moe")


@dataclass(frozen=True)
class QwenMoEConfig:
    """Fields of `config.json` under their own names where they have one; `moe_layers` says which layers are MoE."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    moe_layers: tuple[bool, ...]
    rope: RopeConfig
    moe: MoEConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any], quant: QuantSpec | None = None) -> "QwenMoEConfig":
        """Reads a `config.json`. Raises ConfigError naming a field that is missing, wrong or not supported."""
        fields = Fields(config)
        is_qwen3 = fields.choice("model_type", among=MODEL_TYPES) == "qwen3_moe"
        fields.choice("hidden_act", among=("silu",), default="silu")
        if fields.boolean("use_sliding_window", False):
            raise ConfigError("use_sliding_window must be false, found true: sliding windows are not supported")
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ConfigError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        head_dim = fields.integer("head_dim", default=hidden // heads)
        bias = fields.boolean("attention_bias", False) if is_qwen3 else fields.boolean("qkv_bias", True)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            qkv_bias=bias,
            output_bias=is_qwen3 and bias,
            qk_norm=is_qwen3,
            moe_layers=_moe_layers(fields),
            rope=RopeConfig.from_hf(fields, head_dim),
            moe=MoEConfig(
                hidden_size=hidden,
                expert_size=fields.integer("moe_intermediate_size"),
                num_experts=fields.integer("num_experts", "num_local_experts"),
                top_k=fields.integer("num_experts_per_tok"),
                score="softmax",
                renormalize=fields.boolean("norm_topk_prob", False),
                shared_size=0 if is_qwen3 else fields.integer("shared_expert_intermediate_size"),
                shared_gate=not is_qwen3,
                quant=quant or QuantSpec(),
            ),
        )


def _moe_layers(fields: Fields) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`th layer (none for 0) but those in `mlp_only_layers`."""
    step, dense = fields.integer("decoder_sparse_step", minimum=0, default=1), fields.integers("mlp_only_layers")
    layers = range(fields.integer("num_hidden_layers"))
    return tuple(layer not in dense and step > 0 and (layer + 1) % step == 0 for layer in layers)
