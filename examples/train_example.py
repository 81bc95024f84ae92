"""Trains the bundled example checkpoint: a small DeepSeek-V3-architecture model on the source of the standard library.

    python examples/train_example.py --out runs/example --minutes 60      # stop and start again at will
    python examples/train_example.py --out runs/example --minutes 0 --export crossdock/data/example

The model is crossdock's own: MLA, group-limited sigmoid routing balanced by the selection-bias update
(arXiv:2408.15664), a shared expert, a dense first layer and one MTP layer whose loss is added with weight MTP_WEIGHT.
Parameters are trained in float32 and multiplied in bfloat16. Every step draws its windows from a generator seeded by
(seed, step), so that a run resumed from its snapshot sees what an uninterrupted one would have.
"""

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from crossdock.comm import LocalTransport
from crossdock.gemm import quantize_blocks
from crossdock.models.cache import whole_sequences
from crossdock.models.deepseek import DeepSeekConfig, DeepSeekModel
from crossdock.models.deepseek.names import targets
from crossdock.moe import MoELayer

END = "<|endoftext|>"
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "_bundled",
    "turtledemo",
}
SEQUENCES, LENGTH = 8, 512  # windows a step, tokens a window
PEAK_RATE, WARMUP, MTP_WEIGHT, BIAS_SPEED = 4e-3, 50, 0.3, 4e-3
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 128,
    "q_lora_rank": 192,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}


def corpus() -> list[str]:
    """The standard library's modules in a fixed order, its tests and tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not SKIPPED & set(f.relative_to(root).parts)]
    return [f.read_text(encoding="utf-8", errors="ignore") for f in files]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; runs of spaces become tokens, which is what indentation is made of."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(out: Path) -> tuple[Tensor, Tensor]:
    """Token streams (training, held out: every 40th module), made once and kept in `out`."""
    stored = out / "tokens.pt"
    if not stored.exists():
        texts = corpus()
        tokenizer = train_tokenizer(texts)
        tokenizer.save(str(out / "tokenizer.json"))
        streams: tuple[list[int], list[int]] = ([], [])
        for number, encoded in enumerate(tokenizer.encode_batch(texts)):
            streams[number % 40 == 39].extend([0, *encoded.ids])
        torch.save([torch.tensor(stream, dtype=torch.int16) for stream in streams], stored)
    train, held_out = torch.load(stored)
    return train.long(), held_out.long()


def initialise(model: DeepSeekModel, seed: int) -> None:
    """Normal weights of deviation 1 / sqrt(inputs), projections back into the residual stream scaled down by depth."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * model.cache_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            deviation = 0.02 if name == "embed_tokens" else parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down")):
                deviation *= depth
            parameter.data.normal_(0, deviation, generator=generator)


def losses(model: DeepSeekModel, windows_SL: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (nats) of the next token and, from the MTP layer, of the one after it."""
    inputs, after, second = windows_SL[:, :-2], windows_SL[:, 1:-1], windows_SL[:, 2:]
    batch = whole_sequences(len(inputs), inputs.shape[1], inputs.device)
    hidden = model(inputs.flatten(), batch, None)
    main = F.cross_entropy(model.logits(hidden), after.flatten())
    drafted = model.draft(after.flatten(), hidden, batch, None)
    return main, F.cross_entropy(model.logits(drafted), second.flatten())


def windows(stream: Tensor, seed: int, step: int, count: int) -> Tensor:
    """`count` windows of LENGTH + 2 tokens, drawn from the stream by (seed, step)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - LENGTH - 2, (count,), generator=generator)
    return torch.stack([stream[s : s + LENGTH + 2] for s in starts.tolist()])


def balance(layers: list[MoELayer]) -> float:
    """Moves each selection bias by BIAS_SPEED towards even load; returns the mean of mean / max load."""
    evenness = []
    for layer in layers:
        load = layer.load_E.float()
        assert layer.router.e_score_correction_bias is not None
        layer.router.e_score_correction_bias += BIAS_SPEED * torch.sign(load.mean() - load)
        evenness.append((load.mean() / load.max()).item())
        layer.load_E.zero_()
    return sum(evenness) / len(evenness)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear decay over the last 40 percent."""
    return PEAK_RATE * min((step + 1) / WARMUP, 1.0, max(0.02, (steps - step) / (0.4 * steps)))


def matrices_of(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices that stand in one parameter: each expert's, and the two projections fused in `a_proj`."""
    if tensor.dim() == 3:
        return list(tensor.unbind(0))
    if name.endswith("a_proj.weight"):
        return [tensor[: CONFIG["q_lora_rank"]], tensor[CONFIG["q_lora_rank"] :]]
    return [tensor]


class Trainer:
    """float32 masters of the model's parameters, their optimisers, and a snapshot of all that a resumed run needs.

    Matrices are trained by Muon, each expert's on its own; embedding, output head, routers and norms by AdamW.
    """

    def __init__(self, model: DeepSeekModel, out: Path, steps: int, seed: int) -> None:
        self.model, self.out, self.steps, self.seed, self.step = model, out, steps, seed, 0
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.layers = [m for m in model.modules() if isinstance(m, MoELayer)]
        self.biases = [layer.router.e_score_correction_bias for layer in self.layers]
        self.views: list[list[nn.Parameter]] = []
        matrices, others = [], []
        for (name, parameter), master in zip(model.named_parameters(), self.masters, strict=True):
            self.views.append([nn.Parameter(part) for part in matrices_of(name, master)])
            by_adam = parameter.dim() < 2 or name.endswith(("embed_tokens", "lm_head.weight", "router.weight"))
            (others if by_adam else matrices).extend(self.views[-1])
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
        ]

    def load(self) -> None:
        """Continues from the snapshot, where there is one."""
        if not (self.out / "snapshot.pt").exists():
            return
        state = torch.load(self.out / "snapshot.pt")
        self.step = state["step"]
        for optimiser, stored in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(stored)
        for kept, stored in zip([*self.masters, *self.biases], state["tensors"], strict=True):
            kept.copy_(stored)

    def save(self) -> None:
        """Writes the snapshot beside the old one and then takes its place, so that a kill loses nothing."""
        state = {
            "step": self.step,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "tensors": [*self.masters, *self.biases],
        }
        torch.save(state, self.out / "snapshot.new")
        (self.out / "snapshot.new").rename(self.out / "snapshot.pt")

    def publish(self) -> None:
        """Copies the masters into the model."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data.copy_(master)

    @torch.no_grad()
    def evaluate(self, held_out: Tensor) -> dict[str, float]:
        """Losses on sixteen fixed windows of held-out modules."""
        main, mtp = losses(self.model, windows(held_out, 0, 0, 16))
        for layer in self.layers:
            layer.load_E.zero_()
        return {"step": self.step, "held_out": main.item(), "held_out_mtp": mtp.item()}

    def advance(self, stream: Tensor) -> dict[str, float]:
        """One step of the optimisers and of the selection biases."""
        main, mtp = losses(self.model, windows(stream, self.seed, self.step, SEQUENCES))
        (main + MTP_WEIGHT * mtp).backward()
        for (name, parameter), views in zip(self.model.named_parameters(), self.views, strict=True):
            assert parameter.grad is not None
            grad, parameter.grad = parameter.grad.float(), None
            for view, part in zip(views, matrices_of(name, grad), strict=True):
                view.grad = part
        norm = nn.utils.clip_grad_norm_([view for views in self.views for view in views], 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.step, self.steps)
            optimiser.step()
        self.step += 1
        self.publish()
        evenness = balance(self.layers)
        return {"step": self.step, "loss": main.item(), "mtp": mtp.item(), "norm": norm.item(), "balance": evenness}


def train(trainer: Trainer, stream: Tensor, held_out: Tensor, minutes: float) -> None:
    """Runs until all steps are done or `minutes` have passed; a snapshot every 100 steps and at the end."""
    trainer.load()
    trainer.publish()
    deadline = time.monotonic() + 60 * minutes
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns) as progress, (trainer.out / "log.jsonl").open("a") as log:
        task = progress.add_task("training", total=trainer.steps, completed=trainer.step)
        while trainer.step < trainer.steps and time.monotonic() < deadline:
            row = trainer.advance(stream)
            shown = "  ".join(f"{name} {row[name]:.2f}" for name in ("loss", "mtp", "norm", "balance"))
            progress.update(task, completed=trainer.step, description=shown)
            if trainer.step % 10 == 0:
                print(json.dumps(row | {"time": time.time()}), file=log, flush=True)
            if trainer.step % 100 == 0:
                print(json.dumps(trainer.evaluate(held_out)), file=log, flush=True)
                trainer.save()
    trainer.save()
    print(json.dumps(trainer.evaluate(held_out)))


def export(model: DeepSeekModel, out: Path, directory: Path) -> None:
    """Writes the Hugging Face layout: experts in FP8 blocks with `weight_scale_inv`, routers fp32, the rest bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for target in targets(model):
        name = target.sources[0].name
        value = target.into.float().contiguous()
        if ".experts." in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(value)
        else:
            tensors[name] = value if ".gate." in name else value.bfloat16()
    kept = sorted({name.removesuffix(".weight") for name in tensors if ".experts." not in name and "norm" not in name})
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": [name for name in kept if "e_score" not in name],
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}, indent=2) + "\n")
    Tokenizer.from_file(str(out / "tokenizer.json")).save(str(directory / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="snapshots, tokens and the log")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, resumably, after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="write the trained checkpoint to this directory")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = DeepSeekModel(DeepSeekConfig.from_hf(CONFIG), LocalTransport(), dtype=torch.bfloat16)
    initialise(model, options.seed)
    train(Trainer(model, options.out, options.steps, options.seed), *prepare(options.out), options.minutes)
    if options.export:
        export(model, options.out, options.export)


if __name__ == "__main__":
    main()
