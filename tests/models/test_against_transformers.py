"""The models against transformers: the same greedy tokens from the same checkpoint, and the same bits on any ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crossdock import EPGroup, LocalWorld, generate, load_model, make_transport
from crossdock.comm import LocalTransport, Transport
from crossdock.gemm import dequantize_blocks, quantize_blocks
from crossdock.models.cache import whole_sequences
from crossdock.models.generate import Generation
from tests.launch import Ranks
from tests.models.checkpoints import FAMILIES, build, edit, greedy, save

PROMPT = [5, 17, 9, 33, 21, 4, 8]
OTHERS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9] * 6]
TOKENS = 20


def run(directory: Path, transport: Transport, prompts: list[list[int]], tokens: int = TOKENS) -> Generation:
    loaded = load_model(directory, transport, dtype=torch.float32)
    return generate(loaded.model, prompts, transport, max_new_tokens=tokens)


def run_on_group(group: EPGroup, directory: Path, prompts: list[list[int]]) -> tuple[list[list[int]], str]:
    found = run(directory, make_transport(group), prompts)
    return [output.token_ids for output in found.outputs], found.digest


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_on_any_number_of_ranks(family: str, tmp_path: Path) -> None:
    expected = greedy(save(family, tmp_path), PROMPT, TOKENS)
    digests = set()
    for world_size in (1, 2, 4):
        for found in LocalWorld(world_size).run(lambda t: run(tmp_path, t, [PROMPT])):
            assert found.outputs[0].token_ids == expected
            digests.add(found.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_bits_do_not_depend_on_the_company(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    alone = [run(tmp_path, LocalTransport(), [prompt], 8).outputs[0] for prompt in [PROMPT, *OTHERS]]
    for world_size in (1, 2, 4):
        found = LocalWorld(world_size).run(lambda t: run(tmp_path, t, [PROMPT, *OTHERS], 8))[0]
        assert found.outputs == alone, world_size


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "qwen2_moe"])
def test_bits_do_not_depend_on_one_thread_or_two(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(tmp_path, LocalTransport(), [PROMPT, *OTHERS], 30).digest)
    torch.set_num_threads(1)
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_processes_give_the_same_bits(family: str, tmp_path: Path, ranks_of_two: Ranks, ranks_of_four: Ranks) -> None:
    save(family, tmp_path)
    alone = run(tmp_path, LocalTransport(), [PROMPT, *OTHERS])
    expected = [output.token_ids for output in alone.outputs], alone.digest
    for ranks in (ranks_of_two, ranks_of_four):
        assert all(found == expected for found in ranks.run(run_on_group, tmp_path, [PROMPT, *OTHERS]))


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v3-yarn", "qwen2_moe"])
def test_hidden_states_without_a_cache_agree(family: str, tmp_path: Path) -> None:
    """The form training uses: whole sequences, no cache."""
    reference = save(family, tmp_path)
    model = load_model(tmp_path, LocalTransport(), dtype=torch.float32).model
    ids_SL = torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.no_grad():
        expected = reference(ids_SL).logits
        found = model.logits(model(ids_SL.flatten(), whole_sequences(2, len(PROMPT), ids_SL.device), None))
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-4, atol=1e-4)


def fuse(directory: Path, experts: int, layers: list[str]) -> None:
    """Per-expert tensors into one `gate_up_proj` and one `down_proj` a layer."""
    tensors = load_file(directory / "model.safetensors")
    change: dict[str, torch.Tensor | None] = {}
    for prefix in layers:
        names = {part: [f"{prefix}{e}.{part}_proj.weight" for e in range(experts)] for part in ("gate", "up", "down")}
        gate, up, down = (torch.stack([tensors[n] for n in names[part]]) for part in ("gate", "up", "down"))
        change |= {f"{prefix}gate_up_proj": torch.cat((gate, up), 1), f"{prefix}down_proj": down}
        change |= {name: None for part in names.values() for name in part}
    edit(directory, change)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_fused_experts_load_to_the_same_bits(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    expected = run(tmp_path, LocalTransport(), [PROMPT]).digest
    names = load_file(tmp_path / "model.safetensors")
    prefixes = sorted({name.split("experts.")[0] + "experts." for name in names if ".experts." in name})
    fuse(tmp_path, 8, prefixes)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if ".experts.0." in name]
    assert LocalWorld(2).run(lambda t: run(tmp_path, t, [PROMPT]))[0].digest == expected


def test_fp8_block_weights_are_multiplied_out(tmp_path: Path) -> None:
    """Ours from FP8 blocks against transformers from the same values in float32."""
    reference = save("deepseek_v3", tmp_path)
    change: dict[str, torch.Tensor | None] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if tensor.dim() == 2 and ("proj" in name or ".experts." in name):
            q, scale = quantize_blocks(tensor)
            change |= {name: q, f"{name}_scale_inv": scale}
            whole[name] = dequantize_blocks(q, scale, torch.float32)
    edit(tmp_path, change)
    (tmp_path / "plain").mkdir()
    reference.save_pretrained(tmp_path / "plain")
    edit(tmp_path / "plain", dict(whole))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    expected = greedy(plain, PROMPT, TOKENS)
    assert expected != greedy(build("deepseek_v3"), PROMPT, TOKENS)  # quantisation shows, so the scales are used
    for found in LocalWorld(2).run(lambda t: run(tmp_path, t, [PROMPT])):
        assert found.outputs[0].token_ids == expected
