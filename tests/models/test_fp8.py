"""FP8 checkpoints on the triton backend: what stays FP8, the bits of its steps one by one, and how near it is.

Legend: T tokens, D hidden.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crossdock import generate, load_model
from crossdock._triton import HAS_TRITON
from crossdock.comm import LocalTransport
from crossdock.gemm import (
    dequantize_blocks,
    linear_fp8,
    rms_norm,
    swiglu_quantize,
)
from crossdock.models.blocks import Fp8Linear, Linear, Rotary
from crossdock.models.cache import Batch, PagedCache, Sequence
from crossdock.models.deepseek.absorbed_kernel import absorb_queries_triton
from crossdock.models.deepseek.latent_attention_kernel import attend_latents_triton
from crossdock.models.deepseek.mla import LATENT_NORM_EPS
from crossdock.models.deepseek.mla_kernel import prepare_latents_triton
from crossdock.models.deepseek.model import DecoderLayer
from crossdock.models.deepseek.values_kernel import expand_values_triton
from crossdock.moe import MoELayer
from crossdock.moe.mlp import Fp8MLP
from tests.models.checkpoints import FP8_SIZES, add_mtp, save, to_fp8

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
HALF = torch.float16  # the interpreter rounds it as a GPU does


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fp8")
    save("deepseek_v3", directory, **FP8_SIZES)
    to_fp8(directory)
    return directory


def load(directory: Path, device: torch.device, **options: Any) -> Any:
    options = {"dtype": HALF, "backend": "triton"} | options
    return load_model(directory, LocalTransport(), device=device, **options).model


def same_codes(codes: Tensor, expected: Tensor) -> bool:
    return torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_what_stays_fp8(checkpoint: Path, device: torch.device) -> None:
    """Codes and scales are the checkpoint's own bytes; only kv_b_proj is multiplied out."""
    model, stored = load(checkpoint, device), load_file(checkpoint / "model.safetensors")
    for number, layer in enumerate(model.layers):
        prefix, mla = f"model.layers.{number}.self_attn.", layer.self_attn
        rank = mla.query_rank
        a_proj = torch.cat([stored[f"{prefix}{n}.weight"] for n in ("q_a_proj", "kv_a_proj_with_mqa")])
        assert same_codes(mla.a_proj.weight, a_proj) and rank == 128
        assert torch.equal(mla.a_proj.scale[:1].cpu(), stored[f"{prefix}q_a_proj.weight_scale_inv"])
        assert torch.equal(mla.a_proj.scale[1:].cpu(), stored[f"{prefix}kv_a_proj_with_mqa.weight_scale_inv"])
        for name in ("q_b_proj", "o_proj"):
            assert same_codes(getattr(mla, name).weight, stored[f"{prefix}{name}.weight"])
            assert torch.equal(getattr(mla, name).scale.cpu(), stored[f"{prefix}{name}.weight_scale_inv"])
        w_kv_b = dequantize_blocks(*(stored[f"{prefix}kv_b_proj.weight{end}"] for end in ("", "_scale_inv")))
        assert torch.equal(mla.kv_b_proj.weight.cpu(), w_kv_b.to(HALF))
        mlp, prefix = (layer.mlp, "mlp.") if number == 0 else (layer.mlp.shared_experts, "mlp.shared_experts.")
        prefix = f"model.layers.{number}.{prefix}"
        assert isinstance(mlp, Fp8MLP)
        for end, scale_end in (("gate_up", ""), ("gate_up_scale", "_scale_inv")):
            whole = [stored[f"{prefix}{half}_proj.weight{scale_end}"] for half in ("gate", "up")]
            assert torch.equal(getattr(mlp, end).float().cpu(), torch.cat(whole).float())
        assert same_codes(mlp.down, stored[f"{prefix}down_proj.weight"])
        assert torch.equal(mlp.down_scale.cpu(), stored[f"{prefix}down_proj.weight_scale_inv"])
    assert not [name for name, p in model.named_parameters() if p.dim() > 2 or "gate_up" in name]


def test_what_is_multiplied_out(checkpoint: Path, tmp_path: Path, device: torch.device) -> None:
    """In float32, on the torch backend, and what is dense where a checkpoint holds one of it as it is."""
    for options in ({"dtype": torch.float32}, {"backend": "torch"}):
        model = load(checkpoint, device, **options)
        assert not [module for module in model.modules() if isinstance(module, (Fp8Linear, Fp8MLP))]
    save("deepseek_v3", tmp_path, **FP8_SIZES)
    to_fp8(tmp_path, r"(mlp\.(experts|shared_experts)\..*|o)_proj\.weight$")
    model = load(tmp_path, device)
    assert isinstance(model.layers[1].self_attn.o_proj, Linear)
    assert isinstance(model.layers[1].mlp.shared_experts, Fp8MLP)


def steps(cache: PagedCache) -> Iterator[Batch]:
    """Prompts, a prompt among sequences that decode, and all decoding."""
    first, second = Sequence(), Sequence()
    for pieces in ([(first, 5, False)], [(first, 1, True), (second, 3, False)], [(first, 1, True), (second, 2, True)]):
        yield cache.batch(pieces)
        for sequence, count, _ in pieces:
            sequence.length += count


def run(
    model: Any, number: int, device: torch.device, forward: Callable[..., Any] | None = None, last: int = 3
) -> list[Tensor]:
    """A layer's two addends after each step, and its cache, from inputs that are the same for every model."""
    layer, settings = model.layers[number], model.config
    dtype = layer.input_layernorm.weight.dtype
    cache, rotary = PagedCache(2, model.cache_width, 6, 8, dtype, device), Rotary(settings.rope, device)
    found: list[Tensor] = []
    for step, batch in enumerate(islice(steps(cache), last)):
        generator = torch.Generator().manual_seed(step)
        both = torch.randn(2, len(batch.rows_T), settings.hidden_size, generator=generator).to(device, dtype)
        with torch.no_grad():
            found += (forward or DecoderLayer.__call__)(layer, *both, rotary(batch.positions_T), batch, cache)
    return found if last < 3 else [*found, cache.data[number]]


def step_by_step(layer: Any, x_TD: Tensor, residual_TD: Tensor, *step: Any, pow2: bool) -> tuple[Tensor, Tensor]:
    """The layer with nothing fused: each norm, quantisation, product and sum by itself."""

    def fp8(x: Any, part: Any, name: str = "weight") -> Tensor:
        scale = part.scale if name == "weight" else getattr(part, f"{name}_scale")
        return linear_fp8(x, getattr(part, name), scale, pow2=pow2, out_dtype=HALF, backend="triton")

    def mlp_of(mlp: Fp8MLP, rows_TD: Tensor) -> Tensor:
        return fp8(swiglu_quantize(fp8(rows_TD, mlp, "gate_up"), pow2=pow2, backend="triton"), mlp, "down")

    mla, (rope, batch, cache) = layer.self_attn, step
    norm = layer.input_layernorm
    rows_TD, sum_TD = rms_norm(x_TD, norm.weight, norm.eps, residual_TD, backend="triton")
    of_norms, rows = (mla.q_a_layernorm.weight, mla.kv_a_layernorm.weight), cache.data[mla.layer]
    a_TX = fp8(rows_TD, mla.a_proj)
    q_TQ = prepare_latents_triton(a_TX, *of_norms, rope, batch.rows_T, rows, LATENT_NORM_EPS, mla.interleaved)
    q_TQ, w_XC = fp8(q_TQ, mla.q_b_proj), mla.kv_b_proj.weight
    out_TX = torch.full((len(q_TQ), mla.heads * mla.value), torch.nan, dtype=HALF, device=q_TQ.device)
    for span in batch.spans:
        if not span.decode:
            of_span = slice(span.start, span.stop)
            q_THQ = q_TQ[of_span].view(-1, mla.heads, mla.nope + mla.rope)
            rotary = mla.rotate(q_THQ[..., mla.nope :], (rope[0][of_span], rope[1][of_span]))
            q_THQ = torch.cat((q_THQ[..., : mla.nope], rotary), dim=-1)
            out_TX[of_span] = mla._plain(q_THQ, cache.read(mla.layer, span.rows), span)
    if batch.decoding is not None:
        q_NHX = absorb_queries_triton(q_TQ, w_XC, rope, batch.decoding, mla.heads, mla.interleaved)
        portions = attend_latents_triton(q_NHX, rows, batch.decoding, mla.latent, mla.scale)
        expand_values_triton(*portions, w_XC, batch.decoding, mla.nope, out_TX)
    norm = layer.post_attention_layernorm
    rows_TD, sum_TD = rms_norm(fp8(out_TX, mla.o_proj), norm.weight, norm.eps, sum_TD, backend="triton")
    if isinstance(layer.mlp, Fp8MLP):
        return mlp_of(layer.mlp, rows_TD), sum_TD
    shared, layer.mlp.shared_experts = layer.mlp.shared_experts, None
    routed_TD = layer.mlp(rows_TD)
    layer.mlp.shared_experts = shared
    return routed_TD + mlp_of(shared, rows_TD), sum_TD


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.usefixtures("poison")
def test_bits_are_those_of_the_steps_one_by_one(
    scale_fmt: str | None, checkpoint: Path, tmp_path: Path, device: torch.device
) -> None:
    if scale_fmt:
        save("deepseek_v3", tmp_path, **FP8_SIZES)
        to_fp8(tmp_path, scale_fmt=scale_fmt)
    model = load(tmp_path if scale_fmt else checkpoint, device)
    for number in (1,) if scale_fmt else (0, 1):
        fused = run(model, number, device)
        apart = run(model, number, device, partial(step_by_step, pow2=scale_fmt is not None))
        assert len(fused) == 7 and all(torch.equal(*pair) for pair in zip(fused, apart, strict=True))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """DeepGEMM's, of one minus twice the product over the squares; the worst of what a block gave."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(found, expected, strict=True)]
    return max(float(1 - 2 * (a * b).sum() / (a.square().sum() + b.square().sum())) for a, b in pairs)


@pytest.mark.parametrize("number", [0, 1], ids=["dense", "moe"])
def test_near_the_model_multiplied_out(number: int, checkpoint: Path, device: torch.device) -> None:
    """Nearer than any other tensor would leave it: each weight in turn has its rows moved by one."""
    model, exact = load(checkpoint, device), run(load(checkpoint, device, dtype=torch.float32), number, device)
    most = distance(run(model, number, device), exact)
    assert most < 4e-3
    layer = model.layers[number]
    mlp = layer.mlp.shared_experts if isinstance(layer.mlp, MoELayer) else layer.mlp
    mla = layer.self_attn
    for weight in (mla.a_proj.weight, mla.q_b_proj.weight, mla.o_proj.weight, mlp.gate_up, mlp.down):
        kept = weight.clone()
        weight.view(torch.uint8).copy_(kept.view(torch.uint8).roll(1, 0))
        assert distance(run(model, number, device, last=1), exact[:2]) > 10 * most
        weight.copy_(kept)


def test_generation(tmp_path: Path, device: torch.device) -> None:
    """Alone or in company, with drafts or without: the same tokens and the same bits."""
    save("deepseek_v3", tmp_path, **FP8_SIZES)
    add_mtp(tmp_path, 0.97)
    to_fp8(tmp_path)
    model = load(tmp_path, device)
    assert isinstance(model.mtp.block.self_attn.o_proj, Fp8Linear) and isinstance(model.mtp.eh_proj, Linear)
    run = partial(generate, model, transport=LocalTransport(), max_new_tokens=4, device=device, dtype=HALF)
    prompts = [[5, 17, 9, 33, 21], [3, 1, 4]]
    found = run(prompts, draft_tokens=2)
    assert found.drafted > found.accepted > 0
    if device.type == "cpu":  # on a GPU other dense products are the vendor's
        assert run(prompts[1:]).outputs == found.outputs[1:]
