"""Where each parameter of a Qwen-MoE model stands in a Hugging Face checkpoint."""

from collections.abc import Iterator

from crossdock.models.loader import Target
from crossdock.models.naming import experts, swiglu, whole
from crossdock.models.qwen_moe.model import DecoderLayer, QwenMoEModel
from crossdock.moe import GatedMLP, MoELayer


def targets(model: QwenMoEModel) -> Iterator[Target]:
    """One Target a tensor (or half of a fused one), in checkpoint order, this rank's experts only."""
    yield whole(model.embed_tokens, "model.embed_tokens.weight")
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        yield from _decoder(layer, f"model.layers.{index}.")
    yield whole(model.norm.weight, "model.norm.weight")
    yield whole(model.lm_head.weight, "lm_head.weight", "model.embed_tokens.weight")  # the latter where tied


def _decoder(layer: DecoderLayer, prefix: str) -> Iterator[Target]:
    for name, parameter in layer.self_attn.named_parameters():
        yield whole(parameter, f"{prefix}self_attn.{name}")
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield whole(getattr(layer, name).weight, f"{prefix}{name}.weight")
    mlp = layer.mlp
    if not isinstance(mlp, MoELayer):
        yield from swiglu(mlp, f"{prefix}mlp.")
        return
    yield whole(mlp.router.weight, f"{prefix}mlp.gate.weight")
    yield from experts(mlp, f"{prefix}mlp.experts.")
    if isinstance(mlp.shared_experts, GatedMLP):
        yield from swiglu(mlp.shared_experts, f"{prefix}mlp.shared_expert.")
        yield whole(mlp.shared_experts.gate, f"{prefix}mlp.shared_expert_gate.weight")
