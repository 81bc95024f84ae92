"""A shared expert as one more group: the bits of a layer that computes it apart, in six launches, in one memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock import EPGroup, ExpertPlacement, MoEConfig, MoELayer, make_transport
from crossdock.cli.bench.launches import record_launches
from crossdock.comm import LocalTransport, Transport
from crossdock.gemm import QuantSpec, quantize_blocks, quantize_rows
from crossdock.moe.fused import AUDIT, joined_weights, place_rows_and_tokens_ref, place_rows_and_tokens_triton
from tests.launch import Ranks

PLAIN = MoEConfig(hidden_size=48, expert_size=32, num_experts=6, top_k=2, score="sigmoid", num_groups=2, top_groups=1,
                  scale=2.5, selection_bias=True, shared_size=32)  # fmt: skip
FP8 = MoEConfig(hidden_size=200, expert_size=128, num_experts=4, top_k=2, shared_size=128, quant=QuantSpec("fp8_block"))
POW2 = replace(FP8, quant=QuantSpec("fp8_block", pow2_scales=True))
CONFIGS = {"plain": PLAIN, "fp8": FP8, "fp8-pow2": POW2}


def fill(layer: MoELayer, rank: int = 0) -> MoELayer:
    """The same numbers for an expert, and for the shared one, wherever they stand."""
    shared: Any = layer.shared_experts
    experts: Any = layer.experts
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(layer.router.weight.shape, generator=generator) * 0.3)
        parts = [(shared, ..., 99)]
        parts += [(experts, slot, e) for slot, e in enumerate(layer.placement.experts_of_rank(rank)) if e >= 0]
        for module, at, seed in parts:
            generator = torch.Generator().manual_seed(seed)
            for name in ("gate_up", "down"):
                weight = getattr(module, name)[at]
                made = torch.randn(weight.shape, generator=generator) * 0.3
                if layer.config.quant.kind == "none":
                    weight.copy_(made)
                else:
                    codes, scale = quantize_blocks(made)
                    weight.copy_(codes)
                    getattr(module, f"{name}_scale")[at] = scale
    return layer


def build(
    config: MoEConfig, transport: Transport, placement: ExpertPlacement | None = None, **options: Any
) -> MoELayer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": torch.float32, "backend": "triton"} | options
    return fill(MoELayer(config, transport, placement, device=device, **options), transport.rank)


def build_apart(config: MoEConfig, transport: Transport, placement: ExpertPlacement | None = None) -> MoELayer:
    """The same layer, whose shared expert has been moved into memory of its own."""
    layer = build(config, transport, placement)
    shared: Any = layer.shared_experts
    for parameter in shared.parameters():
        parameter.data = parameter.data.clone()
    for name, buffer in shared.named_buffers():
        setattr(shared, name, buffer.clone())
    assert joined_weights(layer.experts, shared) is None
    return layer


def tokens(config: MoEConfig, count: int, device: torch.device) -> Tensor:
    return torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(2)).to(device)


def run_in_group(group: EPGroup, name: str) -> Tensor:
    """The rank's share of 7 tokens' results."""
    transport, config = make_transport(group), CONFIGS[name]
    layer, share = build(config, transport), -(-7 // transport.world_size)
    assert joined_weights(layer.experts, layer.shared_experts) is None
    with torch.no_grad():
        x_TD = tokens(config, 7, layer.router.weight.device)
        return layer(x_TD[transport.rank * share : (transport.rank + 1) * share]).cpu()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("poison")
def test_bits_are_those_of_the_two_apart(name: str, device: torch.device) -> None:
    """With replicas and a slot without an expert, and with none."""
    config = CONFIGS[name]
    count = config.num_experts
    for placement in (None, ExpertPlacement(count, 1, (*reversed(range(count)), -1, *range(count)))):
        layer, apart = build(config, LocalTransport(), placement), build_apart(config, LocalTransport(), placement)
        assert joined_weights(layer.experts, layer.shared_experts) is not None
        with torch.no_grad():
            for rows in (7, 1, 0):
                x_TD = tokens(config, rows, device)
                found_TD = layer(x_TD)
                assert torch.equal(found_TD, apart(x_TD)) and found_TD.shape == x_TD.shape
        assert torch.equal(layer.load_E, apart.load_E) and layer.load_E.sum() == 8 * config.top_k


@pytest.mark.parametrize("name", ["plain", "fp8"])
def test_bits_are_those_of_the_exchange(name: str, ranks_of_two: Ranks, device: torch.device) -> None:
    with torch.no_grad():
        expected_TD = build(CONFIGS[name], LocalTransport())(tokens(CONFIGS[name], 7, device)).cpu()
    assert torch.equal(torch.cat(ranks_of_two.run(run_in_group, name)), expected_TD)


def test_what_the_shared_expert_adds(device: torch.device) -> None:
    """Against float64, the routed part left to itself."""
    layer, x_TD = build(PLAIN, LocalTransport()), tokens(PLAIN, 7, device)
    shared: Any = layer.shared_experts
    with torch.no_grad():
        found_TD = layer(x_TD)
        layer.shared_experts = None
        gate_TF, up_TF = (x_TD.double() @ shared.gate_up.double().t()).chunk(2, dim=-1)
        expected_TD = (torch.nn.functional.silu(gate_TF) * up_TF) @ shared.down.double().t()
        assert ((found_TD - layer(x_TD)) - expected_TD).abs().max() < 1e-4 * expected_TD.abs().max()


def test_rows_that_come_quantised(device: torch.device) -> None:
    """The same bits, and a launch less: alone, and where the shared expert is computed apart."""
    layer, x_TD = build(FP8, LocalTransport()), tokens(FP8, 7, device)
    codes = quantize_rows(x_TD, backend="triton")
    with torch.no_grad():
        expected_TD = layer(x_TD)
        assert torch.equal(layer(x_TD, codes), expected_TD)
        assert torch.equal(build_apart(FP8, LocalTransport())(x_TD, codes), expected_TD)


def test_a_row_of_nan_stays_alone(device: torch.device) -> None:
    """It has no experts but the shared one, which makes it NaN."""
    layer, x_TD = build(PLAIN, LocalTransport()), tokens(PLAIN, 5, device)
    with torch.no_grad():
        expected_TD = layer(x_TD)
        x_TD[2] = float("nan")
        found_TD = layer(x_TD)
    assert found_TD[2].isnan().all()
    assert torch.equal(found_TD[[0, 1, 3, 4]], expected_TD[[0, 1, 3, 4]])


def test_training_has_the_same_bits_and_its_gradients(device: torch.device) -> None:
    layer, x_TD = build(PLAIN, LocalTransport()), tokens(PLAIN, 5, device)
    with torch.no_grad():
        expected_TD = layer(x_TD)
    y_TD = layer(x_TD)
    assert torch.equal(y_TD.detach(), expected_TD)
    y_TD.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_one_memory_for_both(name: str) -> None:
    """No weight exists twice: both modules' tensors are parts of one, which they fill; loading goes into it."""
    layer = build(CONFIGS[name], LocalTransport())
    held: Any = layer.experts
    shared: Any = layer.shared_experts
    for part in held.NAMES:
        both = getattr(held, part).untyped_storage()
        assert both.data_ptr() == getattr(shared, part).untyped_storage().data_ptr()
        assert both.nbytes() == getattr(held, part).nbytes + getattr(shared, part).nbytes
    again = MoELayer(CONFIGS[name], LocalTransport(), dtype=torch.float32, device=layer.load_E.device, backend="triton")
    again.load_state_dict(layer.state_dict())
    layer.pack()
    x_TD = tokens(CONFIGS[name], 3, layer.load_E.device)
    with torch.no_grad():
        assert torch.equal(again(x_TD), layer(x_TD))


@pytest.mark.parametrize(
    "config",
    [
        replace(PLAIN, shared_size=24),
        replace(PLAIN, shared_size=0),
        replace(PLAIN, shared_gate=True),
        replace(PLAIN, quant=QuantSpec("fp8_row")),
    ],
    ids=["other-size", "none", "gated", "fp8-row"],
)
def test_what_does_not_fit_stays_apart(config: MoEConfig) -> None:
    layer = MoELayer(config, LocalTransport(), dtype=torch.float32, backend="triton")
    assert layer.experts.before == 0 and joined_weights(layer.experts, layer.shared_experts) is None


def test_the_torch_backend_holds_them_apart() -> None:
    layer = MoELayer(PLAIN, LocalTransport(), dtype=torch.float32, backend="torch")
    assert layer.experts.before == 0


@pytest.mark.parametrize("name", ["plain", "fp8"])
def test_launches(name: str, device: torch.device) -> None:
    """Router through sum, the shared expert included; codes come from the norm before."""
    config = CONFIGS[name]
    layer, x_TD = build(config, LocalTransport(), dtype=torch.bfloat16), tokens(config, 5, device).bfloat16()
    codes = None if name == "plain" else quantize_rows(x_TD, backend="triton")
    with torch.inference_mode(), record_launches(x_TD.device) as names:
        layer(x_TD, codes)
    assert len(names) == 6, names


@pytest.mark.parametrize(("rows", "top_k", "slots"), [(0, 1, 3), (1, 1, 1), (5, 2, 4), (700, 3, 5)])
@pytest.mark.usefixtures("poison")
def test_order_of_rows(rows: int, top_k: int, slots: int, device: torch.device) -> None:
    """Against the reference, and by what it means: with ids of no expert, empty slots, and ids that are no slot."""
    slot_ids_TK = torch.randint(-1, slots + 1, (rows, top_k), generator=torch.Generator().manual_seed(rows)).to(device)
    slot_ids_TK[slot_ids_TK == slots - 2] = slots - 1
    found = place_rows_and_tokens_triton(slot_ids_TK, slots)
    for ours, expected in zip(found, place_rows_and_tokens_ref(slot_ids_TK, slots), strict=True):
        assert ours.dtype == expected.dtype == torch.int32 and torch.equal(ours, expected)
    token_R, position_TK, ends_G = (tensor.tolist() for tensor in found)
    assert token_R[:rows] == list(range(rows)) and ends_G[0] == rows
    for token, positions in enumerate(position_TK):
        for slot, position in zip(slot_ids_TK[token].tolist(), positions, strict=True):
            if 0 <= slot < slots:
                assert token_R[rows + position] == token
                assert ends_G[slot] <= rows + position < ends_G[slot + 1]
            else:
                assert position == rows * top_k


def test_spec_fits_its_kernel() -> None:
    (spec,) = AUDIT
    assert list(spec.signature) == list(spec.kernel.arg_names)
