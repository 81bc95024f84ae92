"""Models and machines: sizes and rates that are known, files that hold them, and what cannot be."""

import json

import pytest

from crossdock.cli.shapes import MODELS
from crossdock.errors import ConfigError
from crossdock.models.deepseek import DeepSeekConfig
from crossdock.models.qwen_moe import QwenMoEConfig
from crossdock.simulate import PRESETS, SHAPES, Choice, Cluster, Drawn, LayerShape, Schedule, compare

SHAPE = LayerShape(1024, 256, 32, 4, shared=256)
GPUS = PRESETS["h100-400g"]


def test_shapes_are_those_of_the_configs() -> None:
    """Sizes of the command line's models, and `from_config` reads what the models themselves read."""
    for name, model in MODELS.items():
        shape = SHAPES[name]
        assert (shape.hidden, shape.expert, shape.experts, shape.top_k) == (
            model.hidden,
            model.expert,
            model.experts,
            model.top_k,
        )
    deepseek = {
        "model_type": "deepseek_v3", "vocab_size": 10, "hidden_size": 7168, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 8, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1,
        "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    assert LayerShape.from_config(deepseek) == SHAPES["deepseek-v3"]
    moe = DeepSeekConfig.from_hf(deepseek).moe
    shape = SHAPES["deepseek-v3"]
    assert (moe.num_groups, moe.top_groups, moe.shared_size) == (shape.num_groups, shape.top_groups, shape.shared)
    qwen = {
        "model_type": "qwen3_moe", "vocab_size": 10, "hidden_size": 4096, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8,
        "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
    }  # fmt: skip
    assert LayerShape.from_config(qwen) == SHAPES["qwen3-235b"]
    assert QwenMoEConfig.from_hf(qwen).moe.num_experts == 128
    assert LayerShape.from_config(qwen | {"shared_expert_intermediate_size": 64}).shared == 64
    with pytest.raises(ConfigError, match="moe_intermediate_size"):
        LayerShape.from_config({"hidden_size": 8})
    for quantised, found in (({"quant_method": "awq"}, "found 'awq'"), ({"bits": 4}, "lacks the field")):
        with pytest.raises(ConfigError, match=f"quantization_config.quant_method.*{found}|{found}.*quant_method"):
            LayerShape.from_config(qwen | {"quantization_config": quantised})
    with pytest.raises(ConfigError, match="top_k 9"):
        LayerShape(8, 8, 8, 9)
    with pytest.raises(ConfigError, match="3 groups"):
        LayerShape(8, 8, 8, 1, num_groups=3)


def test_every_preset_says_where_its_numbers_are_from_and_survives_json() -> None:
    for name, cluster in PRESETS.items():
        assert cluster.name == name
        for what in ("inter", "intra", "memory", "latenc", "products", "call_s"):
            assert any(what in source for source in cluster.sources), (name, what)
        assert Cluster.from_json(json.loads(json.dumps(cluster.to_json()))) == cluster


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"inter": None}, "cluster.inter must be an object"),
        ({"inter": {"bytes_per_s": 1.0}}, "cluster.inter lacks latency_s"),
        ({"inter": {"bytes_per_s": "fast", "latency_s": 0}}, "cluster.inter.bytes_per_s"),
        ({"inter": {"bytes_per_s": float("nan"), "latency_s": 0}}, "bytes_per_s must be above 0"),
        ({"inter": {"bytes_per_s": 1, "latency_s": 0, "colour": 1}}, "colour is no field"),
        ({"ranks_per_node": 2.5}, "ranks_per_node"),
        ({"ranks_per_node": 0}, "at least 1"),
        ({"inter": {"bytes_per_s": 1.0, "latency_s": float("inf")}}, "latency_s must be at least 0 and finite"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_cluster_that_cannot_be(change: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        Cluster.from_json(GPUS.to_json() | change)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        Cluster.from_json([1])
    with pytest.raises(ConfigError, match=r"no number 'inter\.speed'"):
        GPUS.changed({"inter.speed": 1.0})
    with pytest.raises(ConfigError, match="no number 'name'"):
        GPUS.changed({"name": 1.0})
    assert GPUS.changed({"ranks_per_node": 4.0}).ranks_per_node == 4
    for value in (float("inf"), float("nan"), 2.5):
        with pytest.raises(ConfigError, match=f"ranks_per_node must be an integer, found {value}"):
            GPUS.changed({"ranks_per_node": value})
    with pytest.raises(ConfigError, match=r"processor\.ranks is no field with a number, found inf"):
        GPUS.changed({"processor.ranks": float("inf")})
    whole = Cluster.from_json(GPUS.to_json() | {"inter": {"bytes_per_s": 10**9, "latency_s": 0}})
    assert whole.changed({"inter.latency_s": 1e-6}).inter.latency_s == 1e-6
    with pytest.raises(ConfigError, match="12 ranks do not fill nodes of 8"):
        list(compare(SHAPE, GPUS, Drawn.skewed(SHAPE), 8, [12], Choice()))
    with pytest.raises(ConfigError, match="tokens"):
        list(compare(SHAPE, GPUS, Drawn.skewed(SHAPE), 0, [8], Choice()))
    for bad in ({"hierarchy": "tree"}, {"wire": "fp4"}, {"chunks": 0}, {"placement": "random"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Schedule(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="plain"):
        Schedule("plain", "fp8")
