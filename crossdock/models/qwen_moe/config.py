"""What a Qwen3-MoE or Qwen2-MoE `config.json` says."""

from dataclasses import dataclass
from typing import Any

from crossdock.errors import ConfigError
from crossdock.gemm import QuantSpec
from crossdock.models.blocks import RopeConfig
from crossdock.moe import MoEConfig


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
        """Reads a `config.json`. Raises ConfigError naming a field that is missing or not supported."""
        kind = config.get("model_type")
        if kind not in ("qwen3_moe", "qwen2_moe"):
            raise ConfigError(f"model_type must be 'qwen3_moe' or 'qwen2_moe', found {kind!r}")
        if config.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act must be 'silu', found {config['hidden_act']!r}")
        if config.get("use_sliding_window"):
            raise ConfigError("use_sliding_window must be false, found true: sliding windows are not supported")
        is_qwen3 = kind == "qwen3_moe"
        try:
            heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
            head_dim = config.get("head_dim") or config["hidden_size"] // heads
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                max_position_embeddings=int(config["max_position_embeddings"]),
                qkv_bias=bool(config.get("attention_bias", False) if is_qwen3 else config.get("qkv_bias", True)),
                output_bias=bool(is_qwen3 and config.get("attention_bias", False)),
                qk_norm=is_qwen3,
                moe_layers=tuple(_is_moe(config, layer) for layer in range(layers)),
                rope=RopeConfig.from_hf(config, head_dim),
                moe=MoEConfig(
                    hidden_size=config["hidden_size"],
                    expert_size=config["moe_intermediate_size"],
                    num_experts=config["num_experts"] if "num_experts" in config else config["num_local_experts"],
                    top_k=config["num_experts_per_tok"],
                    score="softmax",
                    renormalize=bool(config.get("norm_topk_prob", False)),
                    shared_size=0 if is_qwen3 else config["shared_expert_intermediate_size"],
                    shared_gate=not is_qwen3,
                    quant=quant or QuantSpec(),
                ),
            )
        except KeyError as missing:
            raise ConfigError(f"config.json of a {kind} model lacks the field {missing}") from None


def _is_moe(config: dict[str, Any], layer: int) -> bool:
    """Every `decoder_sparse_step`th layer but those in `mlp_only_layers`."""
    step = config.get("decoder_sparse_step", 1)
    return layer not in (config.get("mlp_only_layers") or []) and step > 0 and (layer + 1) % step == 0
