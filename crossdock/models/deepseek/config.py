"""What a DeepSeek-V3 family `config.json` says (deepseek_v3, R1 too; Kimi K2 has the same fields)."""

from dataclasses import dataclass
from typing import Any

from crossdock.gemm import QuantSpec
from crossdock.models.blocks import RopeConfig
from crossdock.models.fields import Fields
from crossdock.moe import MoEConfig

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
         "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings")  # fmt: skip


@dataclass(frozen=True)
class DeepSeekConfig:
    """Fields of `config.json` under their own names where they have one.

    `dense` says how attention's and dense layers' weights are held and multiplied, as far as they can be: in FP8 by
    block all but kv_b_proj, which absorbed attention takes apart.
    """

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
    dense: QuantSpec

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], quant: QuantSpec | None = None, dense: QuantSpec | None = None
    ) -> "DeepSeekConfig":
        """Reads a `config.json`. `quant` is for experts, `dense` for what is dense; None: as they are.

        Raises ConfigError naming a field that is missing, wrong or not supported.
        """
        fields = Fields(config)
        fields.choice("model_type", among=MODEL_TYPES)
        fields.choice("hidden_act", among=("silu",), default="silu")
        fields.choice("scoring_func", among=("sigmoid",), default="sigmoid")
        expert_size = fields.integer("moe_intermediate_size")
        moe = MoEConfig(
            hidden_size=fields.integer("hidden_size"),
            expert_size=expert_size,
            num_experts=fields.integer("n_routed_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            score="sigmoid",
            num_groups=fields.integer("n_group", default=1),
            top_groups=fields.integer("topk_group", default=1),
            renormalize=fields.boolean("norm_topk_prob", True),
            scale=fields.number("routed_scaling_factor", default=1.0),
            selection_bias=True,
            shared_size=expert_size * fields.integer("n_shared_experts", minimum=0, default=0),
            quant=quant or QuantSpec(),
        )
        return cls(
            **{name: fields.integer(name) for name in SIZES},
            q_lora_rank=fields.integer("q_lora_rank") if fields.has("q_lora_rank") else None,
            first_k_dense_replace=fields.integer("first_k_dense_replace", minimum=0, default=0),
            num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", "num_mtp_layers", minimum=0, default=0),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            attention_bias=fields.boolean("attention_bias", False),
            rope_interleave=fields.boolean("rope_interleave", True),
            rope=RopeConfig.from_hf(fields, fields.integer("qk_rope_head_dim")),
            moe=moe,
            dense=dense or QuantSpec(),
        )
