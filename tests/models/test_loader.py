"""The loader: what is read, what is left unread, and one clear error for every way a checkpoint can be broken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossdock import LocalWorld, load_model
from crossdock._triton import HAS_TRITON
from crossdock.comm import LocalTransport
from crossdock.errors import CheckpointError, ConfigError, CrossdockError
from crossdock.gemm import QuantSpec
from crossdock.models import loader
from crossdock.models.cache import whole_sequences
from crossdock.models.loader import Checkpoint, Source, Target, load_into
from crossdock.models.registry import stored_as
from crossdock.moe import MoELayer
from crossdock.moe.fused import joined_weights
from tests.models.checkpoints import edit, save

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save("deepseek_v3", tmp_path)
    return tmp_path


def reconfigure(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))


def shard(directory: Path) -> None:
    """The same checkpoint in two files and an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({n: tensors[n] for n in held}, directory / file)
    index = {"weight_map": {n: file for file, held in files.items() for n in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_with_and_without_an_index(checkpoint: Path) -> None:
    expected = load_model(checkpoint, LocalTransport(), dtype=torch.float32).model.state_dict()
    shard(checkpoint)
    for _ in range(2):
        found = load_model(checkpoint, LocalTransport(), dtype=torch.float32).model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        (checkpoint / "model.safetensors.index.json").unlink(missing_ok=True)


def test_each_rank_reads_its_own_experts_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, source: (read.append(source.name), original(self, source))[1])
    monkeypatch.setattr(loader, "REOPEN_BYTES", 1000)  # the shard is mapped anew many times and nothing is lost

    def experts_read(world_size: int, rank: int) -> set[int]:
        def load(transport: object) -> None:
            if transport.rank == rank:  # type: ignore[attr-defined]
                load_model(checkpoint, transport, dtype=torch.float32)  # type: ignore[arg-type]

        read.clear()
        LocalWorld(world_size).run(load)
        return {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name}

    assert experts_read(1, 0) == set(range(8))
    assert experts_read(4, 0) == {0, 1} and experts_read(4, 3) == {6, 7}


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_the_triton_backend(family: str, dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    """The weights are those of the torch backend, the shared expert's too, which share memory with the routed ones'."""
    save(family, tmp_path)
    torchs, ours = (
        load_model(tmp_path, LocalTransport(), dtype=dtype, device=device, backend=backend).model
        for backend in ("torch", "triton")
    )
    layers = [part for part in ours.modules() if isinstance(part, MoELayer)]
    for layer in layers:
        joined = joined_weights(layer.experts, layer.shared_experts)
        assert (joined is not None) == (family == "deepseek_v3")
    ids_T = torch.tensor([5, 17, 9, 33, 21, 4, 8], device=device)
    batch = whole_sequences(1, len(ids_T), device)
    with torch.no_grad():
        found_TV, expected_TV = (model.logits(model(ids_T, batch, None)) for model in (ours, torchs))
    if dtype == torch.float32:
        assert (found_TV - expected_TV).abs().max() < 1e-4 * expected_TV.abs().max()
        expected = torchs.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    else:
        assert found_TV.isfinite().all()


def test_part_of_a_tensor_is_read(tmp_path: Path) -> None:
    stored = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)
    save_file({"fused": stored}, tmp_path / "model.safetensors")
    into = torch.empty(2, 5, dtype=torch.bfloat16)
    seen: list[tuple[int, int]] = []
    report = load_into(
        Checkpoint(tmp_path), [Target(into, (Source("fused", (2, slice(3, 5))),))], lambda *s: seen.append(s)
    )
    assert torch.equal(into, stored[2, 3:5].bfloat16())
    assert report.bytes_read == 2 * 5 * 4 and seen == [(40, 40)] and report.unused == ()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def fp8(directory: Path, scale: torch.Tensor | None) -> None:
    weight = load_file(directory / "model.safetensors")[EXPERT].to(torch.float8_e4m3fn)
    edit(directory, {EXPERT: weight} | ({} if scale is None else {f"{EXPERT}_scale_inv": scale}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: is not readable JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object, found list"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no .*safetensors file"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "model.safetensors: truncated or corrupt"),
    "corrupt": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 200), "truncated or corrupt"),
    "tensor missing": (lambda d: edit(d, {EXPERT: None}), f"tensor {EXPERT} or .* is missing"),
    "wrong shape": (lambda d: edit(d, {EXPERT: torch.zeros(40, 63)}), r"shape \[40, 63\], expected \[40, 64\]"),
    "wrong dtype": (
        lambda d: edit(d, {EXPERT: torch.zeros(40, 64, dtype=torch.int32)}),
        "dtype I32, expected one of BF16",
    ),
    "FP8 without scale": (lambda d: fp8(d, None), "is FP8, but its .*_scale_inv is missing"),
    "FP8 of one dimension": (
        lambda d: edit(
            d,
            {
                "model.norm.weight": torch.zeros(64, dtype=torch.float8_e4m3fn),
                "model.norm.weight_scale_inv": torch.ones(1),
            },
        ),
        r"model.norm.weight is FP8 and has shape \[64\], expected at least two dimensions",
    ),
    "scale of another shape": (lambda d: fp8(d, torch.ones(2, 1)), r"is F32 \[2, 1\], expected F32 \[1, 1\]"),
    "NaN scale": (lambda d: fp8(d, torch.tensor([[float("nan")]])), "scale that is NaN or infinite"),
    "unknown model": (lambda d: reconfigure(d, model_type="mixtral"), "model_type must be one of .*found 'mixtral'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_clear_error(name: str, checkpoint: Path) -> None:
    damage, names = BROKEN[name]
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=names):
        load_model(checkpoint, LocalTransport(), dtype=torch.float32)


YARN = {"rope_type": "yarn", "factor": 8.0}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_experts_per_tok": 9}, "top_k 9 is more than the 4 experts in top_groups 2"),
        ({"n_group": 3}, "num_experts 8 is no multiple of num_groups 3"),
        ({"scoring_func": "softmax"}, "scoring_func must be 'sigmoid', found 'softmax'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', found 'gelu'"),
        ({"hidden_size": "big"}, "hidden_size must be an integer of at least 1, found 'big'"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer of at least 1, found 64.0"),
        ({"vocab_size": "97"}, "vocab_size must be an integer of at least 1, found '97'"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok must be an integer of at least 1, found True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, found 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer of at least 1, found 0"),
        ({"first_k_dense_replace": "1"}, "first_k_dense_replace must be an integer of at least 0, found '1'"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be an integer of at least 0, found -1"),
        ({"max_position_embeddings": "256"}, "max_position_embeddings must be an integer of at least 1, found '256'"),
        ({"rms_norm_eps": "abc"}, "rms_norm_eps must be a number of at least 0, found 'abc'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number of at least 0, found nan"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob must be true or false, found 'no'"),
        ({"eos_token_id": "x"}, "eos_token_id must be an integer or a list of integers, found 'x'"),
        ({"eos_token_id": [1, None]}, r"eos_token_id must be an integer or a list of integers, found \[1, None\]"),
        ({"qk_rope_head_dim": 7}, "the rotary width of a head must be even and at least 2, found 7"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be an object, found 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters.rope_type must be 'default' or 'yarn', found 'longrope'",
        ),
        (
            {"rope_parameters": YARN | {"rope_theta": 1.0}},
            "rope_parameters.rope_theta must be a number above 1, found 1.0",
        ),
        (
            {"rope_parameters": YARN | {"original_max_position_embeddings": -32}},
            "rope_parameters.original_max_position_embeddings must be an integer of at least 1, found -32",
        ),
        ({"rope_parameters": YARN | {"beta_fast": 0}}, "rope_parameters.beta_fast must be a number above 0, found 0"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, found 'fp8'"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config.quant_method must be 'fp8', found 'awq'",
        ),
        ({"quantization_config": {"bits": 4}}, "lacks the field 'quantization_config.quant_method'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"weight_block_size must be \[128, 128\], found \[64, 64\]",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": 64}},
            r"weight_block_size must be \[128, 128\], found 64$",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "scale_fmt": "e5"}},
            "quantization_config.scale_fmt must be 'ue8m0', found 'e5'",
        ),
    ],
)
def test_a_config_that_cannot_work_is_named(fields: dict[str, object], names: str, checkpoint: Path) -> None:
    reconfigure(checkpoint, **fields)
    with pytest.raises(ConfigError, match=names):
        load_model(checkpoint, LocalTransport(), dtype=torch.float32)


@pytest.mark.parametrize("name", ["float8", 7])
def test_a_dtype_that_is_not_known_is_named(name: object, checkpoint: Path) -> None:
    reconfigure(checkpoint, dtype=name)
    with pytest.raises(ConfigError, match=f"dtype must be 'float32' or .*, found {name!r}"):
        load_model(checkpoint, LocalTransport())


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "the rotary width of a head must be even and at least 2, found 15"),
        ({"mlp_only_layers": ["1"]}, r"mlp_only_layers must be an integer or a list of integers, found \['1'\]"),
        ({"decoder_sparse_step": None, "num_hidden_layers": -1}, "num_hidden_layers must be an integer of at least 1"),
        ({"use_sliding_window": True}, "use_sliding_window must be false, found true"),
    ],
)
def test_a_qwen_config_that_cannot_work_is_named(fields: dict[str, object], names: str, tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path)
    reconfigure(tmp_path, **fields)
    with pytest.raises(ConfigError, match=names):
        load_model(tmp_path, LocalTransport(), dtype=torch.float32)


def test_kimi_k2_is_read_as_deepseek_v3(checkpoint: Path) -> None:
    expected = load_model(checkpoint, LocalTransport(), dtype=torch.float32).model.state_dict()
    reconfigure(checkpoint, model_type="kimi_k2", rope_parameters=None, rope_theta=50000.0, eos_token_id=[5, 7])
    loaded = load_model(checkpoint, LocalTransport(), dtype=torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.stop_ids == {5, 7}


def test_the_format_of_scales_is_taken_over() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert stored_as({}) == stored_as({"quantization_config": None}) == QuantSpec()
    assert stored_as({"quantization_config": fp8}) == QuantSpec("fp8_block")
    assert stored_as({"quantization_config": fp8 | {"scale_fmt": "ue8m0"}}) == QuantSpec("fp8_block", pow2_scales=True)


def test_a_missing_field_and_a_missing_directory_are_named(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["kv_lora_rank"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="deepseek_v3 model lacks the field 'kv_lora_rank'"):
        load_model(checkpoint, LocalTransport())
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        load_model(checkpoint / "nowhere", LocalTransport())


def test_experts_that_do_not_divide_over_the_ranks_are_named(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="8 experts do not divide over 3 ranks"):
        LocalWorld(3).run(lambda t: load_model(checkpoint, t))


def test_an_index_that_names_an_absent_file(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CrossdockError, match=r"model-00002-of-00002.safetensors: no such file"):
        load_model(checkpoint, LocalTransport())
