"""`LayerShape`: what a prediction needs to know of a model, from its `config.json` or by name."""

from dataclasses import dataclass
from typing import Any

from crossdock.errors import ConfigError
from crossdock.models.fields import Fields

SCALE_BLOCK, ALIGN = 128, 16  # values that share a float32 scale on the FP8 wire; bytes its parts are multiples of


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer: sizes, the groups its routing is limited to, and how its experts are held.

    hidden       D
    expert       F, inner size of one routed expert
    experts      E
    top_k        K
    num_groups   groups of experts; a token takes its experts from `top_groups` of them
    shared       inner size of the shared expert, 0 for none
    fp8_experts  experts are held and multiplied in FP8, else in bfloat16
    """

    hidden: int
    expert: int
    experts: int
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    shared: int = 0
    fp8_experts: bool = False

    def __post_init__(self) -> None:
        if min(self.hidden, self.expert, self.experts, self.top_k, self.num_groups, self.top_groups) < 1:
            raise ConfigError(f"sizes of a layer must be at least 1, found {self}")
        if self.experts % self.num_groups or self.top_groups > self.num_groups or self.shared < 0:
            raise ConfigError(f"{self.experts} experts cannot be {self.num_groups} groups with {self.top_groups} taken")
        if self.top_k > self.experts // self.num_groups * self.top_groups:
            raise ConfigError(f"top_k {self.top_k} is more than the experts a token may choose from: {self}")

    @property
    def native_row(self) -> int:
        """Bytes of a row in bfloat16."""
        return 2 * self.hidden

    @property
    def fp8_row(self) -> int:
        """Bytes of a row as e4m3 with its scales."""
        scales = 4 * -(-self.hidden // SCALE_BLOCK)
        return (-(-self.hidden // ALIGN) + -(-scales // ALIGN)) * ALIGN

    @property
    def expert_flops(self) -> int:
        """Operations for one row in one expert: gate, up and down."""
        return 6 * self.hidden * self.expert

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.expert * (1 if self.fp8_experts else 2)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LayerShape":
        """Reads a Hugging Face `config.json` with DeepSeek's or Qwen's field names.

        Raises ConfigError naming a field that is missing or wrong, and for experts quantised otherwise than to FP8.
        """
        fields = Fields(config)
        fp8 = fields.has("quantization_config")
        if fp8:
            fields.section("quantization_config").choice("quant_method", among=("fp8",))
        expert = fields.integer("moe_intermediate_size")
        shared = expert * fields.integer("n_shared_experts", minimum=0, default=0)
        return cls(
            hidden=fields.integer("hidden_size"),
            expert=expert,
            experts=fields.integer("n_routed_experts", "num_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            num_groups=fields.integer("n_group", default=1),
            top_groups=fields.integer("topk_group", default=1),
            shared=shared or fields.integer("shared_expert_intermediate_size", minimum=0, default=0),
            fp8_experts=fp8,
        )


# Sizes of each checkpoint's config.json. DeepSeek-V3 and Kimi K2 are published in FP8, the Qwen models in BF16.
SHAPES = {
    "deepseek-v3": LayerShape(7168, 2048, 256, 8, num_groups=8, top_groups=4, shared=2048, fp8_experts=True),
    "kimi-k2": LayerShape(7168, 2048, 384, 8, shared=2048, fp8_experts=True),
    "qwen3-235b": LayerShape(4096, 1536, 128, 8),
    "qwen3-30b": LayerShape(2048, 768, 128, 8),
}
