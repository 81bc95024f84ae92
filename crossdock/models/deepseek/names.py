"""Where each parameter of a DeepSeek-V3 model stands in a Hugging Face checkpoint: one table for reading and writing.

Legend: e logical expert, F expert inner size.
"""

from collections.abc import Iterator

from crossdock.models.deepseek.mla import MLA
from crossdock.models.deepseek.model import DecoderLayer, DeepSeekModel, MTPLayer
from crossdock.models.loader import Target
from crossdock.models.naming import experts, projection, swiglu, whole
from crossdock.moe import MoELayer


def targets(model: DeepSeekModel) -> Iterator[Target]:
    """One Target a tensor (or half of a fused one), in checkpoint order, this rank's experts only."""
    yield whole(model.embed_tokens, "model.embed_tokens.weight")
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        yield from _decoder(layer, f"model.layers.{index}.")
    yield whole(model.norm.weight, "model.norm.weight")
    yield whole(model.lm_head.weight, "lm_head.weight", "model.embed_tokens.weight")  # the latter where tied
    if model.mtp is not None:
        yield from _mtp(model.mtp, f"model.layers.{len(model.layers)}.")


def _decoder(layer: DecoderLayer, prefix: str) -> Iterator[Target]:
    yield whole(layer.input_layernorm.weight, f"{prefix}input_layernorm.weight")
    yield from _attention(layer.self_attn, f"{prefix}self_attn.")
    yield whole(layer.post_attention_layernorm.weight, f"{prefix}post_attention_layernorm.weight")
    mlp, prefix = layer.mlp, f"{prefix}mlp."
    if not isinstance(mlp, MoELayer):
        yield from swiglu(mlp, prefix)
        return
    yield whole(mlp.router.weight, f"{prefix}gate.weight")
    assert mlp.router.e_score_correction_bias is not None
    yield whole(mlp.router.e_score_correction_bias, f"{prefix}gate.e_score_correction_bias")
    yield from experts(mlp, f"{prefix}experts.")
    if mlp.shared_experts is not None:
        yield from swiglu(mlp.shared_experts, f"{prefix}shared_experts.")


def _attention(mla: MLA, prefix: str) -> Iterator[Target]:
    rank = mla.query_rank
    compressed = mla.q_b_proj is not None
    yield projection(mla.a_proj, f"{prefix}{'q_a_proj' if compressed else 'q_proj'}.weight", slice(0, rank))
    yield projection(mla.a_proj, f"{prefix}kv_a_proj_with_mqa.weight", slice(rank, None))
    if mla.a_proj.bias is not None:
        if compressed:  # q_proj never has a bias: its rows stay zero
            yield whole(mla.a_proj.bias[:rank], f"{prefix}q_a_proj.bias")
        yield whole(mla.a_proj.bias[rank:], f"{prefix}kv_a_proj_with_mqa.bias")
    for name in ("q_b_proj", "kv_b_proj", "o_proj"):
        part = getattr(mla, name)
        if part is not None:
            yield projection(part, f"{prefix}{name}.weight")
    for name, parameter in mla.named_parameters():
        if "layernorm" in name or name == "o_proj.bias":
            yield whole(parameter, f"{prefix}{name}")


def _mtp(mtp: MTPLayer, prefix: str) -> Iterator[Target]:
    for part in ("enorm", "hnorm", "eh_proj"):
        yield whole(getattr(mtp, part).weight, f"{prefix}{part}.weight")
    yield from _decoder(mtp.block, prefix)
    yield whole(mtp.norm.weight, f"{prefix}shared_head.norm.weight")
