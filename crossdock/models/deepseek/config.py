"""What a DeepSeek-V3 family `config.json` says (deepseek_v3; R1 and Kimi K2 are the same)."""

from dataclasses import dataclass
from typing import Any

from crossdock.errors import ConfigError
from crossdock.gemm import QuantSpec
from crossdock.models.blocks import RopeConfig
from crossdock.moe import MoEConfig

PLAIN_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # fmt: skip


@dataclass(frozen=True)
class DeepSeekConfig:
    """Fields of `config.json` under their own names where they have one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    num_nextn_predict_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool
    rope_interleave: bool
    rope: RopeConfig
    moe: MoEConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any], quant: QuantSpec | None = None) -> "DeepSeekConfig":
        """Reads a `config.json`. Raises ConfigError naming a field that is missing or not supported."""
        if config.get("model_type") != "deepseek_v3":
            raise ConfigError(f"model_type must be 'deepseek_v3', found {config.get('model_type')!r}")
        if config.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act must be 'silu', found {config['hidden_act']!r}")
        if config.get("scoring_func", "sigmoid") != "sigmoid":
            raise ConfigError(f"scoring_func must be 'sigmoid', found {config['scoring_func']!r}")
        try:
            moe = MoEConfig(
                hidden_size=config["hidden_size"],
                expert_size=config["moe_intermediate_size"],
                num_experts=config["n_routed_experts"],
                top_k=config["num_experts_per_tok"],
                score="sigmoid",
                num_groups=config.get("n_group") or 1,
                top_groups=config.get("topk_group") or 1,
                renormalize=bool(config.get("norm_topk_prob", True)),
                scale=float(config.get("routed_scaling_factor", 1.0)),
                selection_bias=True,
                shared_size=config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
                quant=quant or QuantSpec(),
            )
            return cls(
                **{name: config[name] for name in PLAIN_FIELDS},
                q_lora_rank=config.get("q_lora_rank"),
                first_k_dense_replace=config.get("first_k_dense_replace") or 0,
                num_nextn_predict_layers=config.get("num_nextn_predict_layers", config.get("num_mtp_layers")) or 0,
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                max_position_embeddings=int(config["max_position_embeddings"]),
                attention_bias=bool(config.get("attention_bias", False)),
                rope_interleave=config.get("rope_interleave", True) is not False,
                rope=RopeConfig.from_hf(config, config["qk_rope_head_dim"]),
                moe=moe,
            )
        except KeyError as missing:
            raise ConfigError(f"config.json of a deepseek_v3 model lacks the field {missing}") from None
