"""MLA by kernels as part of a model: the layer of torch operations, the same tokens, and how many launches it takes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock import generate, load_model
from crossdock._triton import interpreting
from crossdock.cli.bench.launches import record_launches
from crossdock.comm import LocalTransport
from crossdock.gemm import QuantSpec
from crossdock.models.blocks import Rotary
from crossdock.models.cache import Batch, PagedCache, Sequence
from crossdock.models.deepseek.config import DeepSeekConfig
from crossdock.models.deepseek.mla import MLA
from crossdock.models.deepseek.model import DecoderLayer
from tests.models.checkpoints import DEEPSEEK, YARN, add_mtp, save
from tests.models.latents import decades

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")


def config(quant: QuantSpec | None = None, **changes: Any) -> DeepSeekConfig:
    return DeepSeekConfig.from_hf(DEEPSEEK | {"model_type": "deepseek_v3"} | changes, quant, quant)


def layer(kind: type, *args: Any, **options: Any) -> Any:
    """A layer whose parameters are random numbers, the same whenever it is built."""
    built = kind(*args, **options).requires_grad_(False)
    generator = torch.Generator().manual_seed(8)
    for name, parameter in built.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(values + 1.0 if "norm" in name else values)
    return built


def steps(cache: PagedCache) -> Iterator[Batch]:
    """Prompts, then one more prompt among sequences that decode one token or two, then all decode."""
    first, second, third = Sequence(), Sequence(), Sequence()
    for pieces in (
        [(first, 21, False), (second, 3, False)],
        [(second, 2, True), (third, 5, False), (first, 1, True)],
        [(first, 1, True), (second, 1, True), (third, 1, True), (Sequence(), 1, False)],
        [(third, 2, True), (first, 2, True)],
    ):
        yield cache.batch(pieces)
        for sequence, count, _ in pieces:
            sequence.length += count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None, "rope_interleave": False}, {"rope_parameters": YARN, "attention_bias": True}],
    ids=["interleaved", "no-q-lora-halves", "yarn-bias"],
)
@pytest.mark.usefixtures("poison")
def test_the_layer_is_that_of_torch_operations(
    dtype: torch.dtype, changes: dict[str, Any], device: torch.device
) -> None:
    settings = config(**changes)
    outputs: list[list[Tensor]] = []
    for backend in ("torch", "triton"):
        mla, rotary = layer(MLA, settings, 0, dtype, device, backend=backend), Rotary(settings.rope, device)
        cache = PagedCache(1, 24, 9, 8, dtype, device)
        outputs.append([])
        for number, batch in enumerate(steps(cache)):
            x_TD = decades(len(batch.rows_T), 64, seed=number, dtype=dtype, device=device)
            outputs[-1].append(mla(x_TD, rotary(batch.positions_T), batch, cache))
        outputs[-1].append(cache.data[0])
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for found, expected in zip(*reversed(outputs), strict=True):
        size = expected.double().abs().amax(-1, keepdim=True)
        assert ((found.double() - expected.double()).abs() <= tolerance * size).all()


def test_generation_by_kernels(tmp_path: Path, device: torch.device) -> None:
    """The tokens of the torch backend; alone or in company, with drafts or without, the same bits."""
    save("deepseek_v3", tmp_path)
    add_mtp(tmp_path, 0.85)
    model = load_model(tmp_path, LocalTransport(), dtype=torch.float32, device=device).model
    run = partial(generate, model, transport=LocalTransport(), max_new_tokens=5, device=device)
    prompts = [[5, 17, 9, 33, 21, 4, 8], [3, 1, 4]]
    parts = [part for part in model.modules() if hasattr(part, "in_kernels")]
    tokens = []
    for in_kernels in (False, True):
        for part in parts:
            part.in_kernels = in_kernels
        found = run(prompts, draft_tokens=2)
        assert found.drafted > found.accepted > 0
        tokens.append([output.token_ids for output in found.outputs])
        if interpreting():  # on a GPU the dense products are the vendor's
            assert run(prompts[1:]).outputs == found.outputs[1:]
    assert tokens[0] == tokens[1]


ATTENTION = ["rms_norm_kernel", "product", "prepare_latents_kernel", "product", "absorb_queries_kernel",
             "attend_latents_kernel", "expand_values_kernel", "product", "rms_norm_kernel"]  # fmt: skip
CORE = 3  # queries absorbed, latents averaged, values expanded
ROUTED = ["router_gemm_kernel", "select_kernel", "place_rows_and_tokens_kernel"]
KINDS = {
    **dict.fromkeys(("mm", "addmm", "linear", "grouped_gemm_kernel", "grouped_gemm_fp8_kernel"), "product"),
    **dict.fromkeys(("grouped_swiglu_kernel", "grouped_swiglu_fp8_kernel"), "product and swiglu"),
}
FP8 = {"q_lora_rank": 128, "v_head_dim": 128, "moe_intermediate_size": 128, "intermediate_size": 256}


@pytest.mark.skipif(not interpreting(), reason="counts what the interpreter is asked to run")
@pytest.mark.parametrize("number", [0, 1], ids=["dense", "moe"])
@pytest.mark.parametrize(
    ("changes", "quant"),
    [({}, None), ({"q_lora_rank": None}, None), (FP8, QuantSpec("fp8_block"))],
    ids=["bf16", "no-q-lora", "fp8"],
)
def test_launches_of_a_decoder_layer(
    changes: dict[str, Any], quant: QuantSpec | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sequences decode: outside attention's core twelve with experts, the shared one included, or eight.

    The norm's sum, the norm and what quantises are one launch; so are gate, up, SwiGLU and what quantises.
    """
    monkeypatch.setattr("crossdock.linear._lacks", lambda dtype: False)  # a dense product is one, as on a GPU
    settings = config(quant=quant, **changes)
    decoder = layer(DecoderLayer, settings, number, LocalTransport(), torch.bfloat16, CPU, backend="triton")
    cache = PagedCache(2, 24, 9, 8, torch.bfloat16, CPU)
    sequences = [Sequence(length=length) for length in (11, 3, 20)]
    batch = cache.batch([(sequence, 1 + (number == 1), True) for number, sequence in enumerate(sequences)])
    assert batch.decoding is not None  # built once a step, for all layers
    x_TD, rope = torch.randn(4, 64).bfloat16(), Rotary(settings.rope, CPU)(batch.positions_T)
    with torch.inference_mode():
        decoder(x_TD, x_TD, rope, batch, cache)
        with record_launches(CPU) as names:
            decoder(x_TD, x_TD, rope, batch, cache)
    mlp = ["product and swiglu", "product"]
    expected = list(ATTENTION) if settings.q_lora_rank else ATTENTION[:3] + ATTENTION[4:]
    expected += [*ROUTED, *mlp, "weighted_sum_kernel"] if number else mlp
    assert [KINDS.get(name, name) for name in names] == expected
    assert len(names) - CORE <= (12 if number else 8)
    assert (quant is None) == (not any("fp8" in name for name in names))
