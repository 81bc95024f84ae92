"""Random-weight checkpoints written by transformers, small enough for a test and odd enough to catch mistakes."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16,
    "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "max_position_embeddings": 256,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
FP8_SIZES = {"hidden_size": 192, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 128, "v_head_dim": 128,
             "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
        "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.0}  # fmt: skip
QWEN: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3,
    "max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "deepseek_v3-no-q-lora": ("DeepseekV3", DEEPSEEK | {"q_lora_rank": None}),
    "deepseek_v3-one-group": ("DeepseekV3", DEEPSEEK | {"n_group": 1, "topk_group": 1}),
    "deepseek_v3-yarn": ("DeepseekV3", DEEPSEEK | {"rope_parameters": YARN}),
    "qwen3_moe": ("Qwen3Moe", QWEN | {"head_dim": 24, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2Moe", QWEN | {"shared_expert_intermediate_size": 48, "norm_topk_prob": False}),
}


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """The transformers model of a family, float32, weights wide enough that no two logits are close."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(options | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key:
                continue
            if tensor.dim() > 1:
                tensor.normal_(0, 0.15, generator=generator)
            elif "norm" in key:
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0, 0.1, generator=generator)
    return model


def save(family: str, directory: Path, seed: int = 0, **changes: Any) -> Any:
    """Writes a checkpoint with save_pretrained; returns the model."""
    model = build(family, seed, **changes)
    model.save_pretrained(directory)
    return model


def edit(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Rewrites the single shard with tensors replaced, added or (None) removed."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | {name: t for name, t in change.items() if t is not None}
    save_file({n: t for n, t in tensors.items() if n not in change or change[n] is not None}, path, {"format": "pt"})


def to_fp8(directory: Path, matches: str = r"_proj(_with_mqa)?\.weight$", scale_fmt: str | None = None) -> None:
    """Rewrites the matrices whose names match as e4m3 in blocks of 128x128 with their scales, as DeepSeek stores them.

    `scale_fmt` "ue8m0" rounds scales up to powers of two and says so.
    """
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if re.search(matches, name)]:
        weight = tensors.pop(name).float()
        scale = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for n, k in itertools.product(range(scale.shape[0]), range(scale.shape[1])):
            block = slice(128 * n, 128 * n + 128), slice(128 * k, 128 * k + 128)
            scale[n, k] = weight[block].abs().max() / 448.0
            if scale_fmt:
                scale[n, k] = 2.0 ** scale[n, k].log2().ceil()
            codes[block] = (weight[block] / scale[n, k]).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["quantization_config"] |= {"scale_fmt": scale_fmt} if scale_fmt else {}
    (directory / "config.json").write_text(json.dumps(config))


def add_mtp(directory: Path, predictable: float) -> None:
    """Gives a deepseek_v3 checkpoint an MTP layer, and a next token that depends on the last one but for a remainder.

    At 1.0 every token's successor is fixed and the MTP layer knows it; at 0.0 drafts are noise.
    """
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    vocab, size = tensors["model.embed_tokens.weight"].shape
    last = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    for name in [n for n in tensors if n.startswith(f"model.layers.{last - 1}.")]:
        copy = tensors[name].roll(1, 0) if tensors[name].dim() > 1 else tensors[name].clone()
        tensors[name.replace(f"layers.{last - 1}.", f"layers.{last}.")] = copy
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"model.layers.{last}.{name}.weight"] = torch.ones(size)
    near, noise = torch.eye(size), torch.randn(size, 2 * size, generator=generator) * 0.1
    tensors[f"model.layers.{last}.eh_proj.weight"] = (
        predictable * torch.cat((near, 0 * near), 1) + (1 - predictable) * noise
    )
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= 1.0 - predictable
    embedding = torch.nn.functional.normalize(torch.randn(vocab, size, generator=generator), dim=-1)
    tensors["model.embed_tokens.weight"] = embedding
    tensors["lm_head.weight"] = embedding[torch.randperm(vocab, generator=generator)].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """transformers' own greedy continuation; by the mask, a token 0 of the prompt is no padding."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
    found: list[int] = out[0].tolist()[len(prompt) :]
    return found
