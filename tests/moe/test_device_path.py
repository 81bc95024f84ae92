"""The path without an exchange on the triton backend: few launches, no host, and the bits of the path with one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock import EPGroup, ExpertPlacement, MoEConfig, MoELayer, make_transport
from crossdock.cli.bench.launches import record_launches
from crossdock.comm import LocalTransport, Transport
from crossdock.gemm import QuantSpec, quantize_blocks, quantize_whole_rows
from tests.launch import Ranks

PLAIN = MoEConfig(hidden_size=48, expert_size=32, num_experts=6, top_k=2, score="sigmoid", num_groups=2, top_groups=1,
                  scale=2.5, selection_bias=True, shared_size=24)  # fmt: skip
FP8 = MoEConfig(hidden_size=128, expert_size=128, num_experts=4, top_k=2, quant=QuantSpec("fp8_block"))
FP8_ROW = MoEConfig(hidden_size=48, expert_size=40, num_experts=4, top_k=2, quant=QuantSpec("fp8_row"))
CONFIGS = {"plain": PLAIN, "fp8": FP8, "fp8_row": FP8_ROW}


def build(config: MoEConfig, transport: Transport, placement: ExpertPlacement | None = None) -> MoELayer:
    """A float32 layer on the triton backend, expert e the same whatever slot it is in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = MoELayer(config, transport, placement, dtype=torch.float32, device=device, backend="triton")
    experts: Any = layer.experts
    with torch.no_grad():
        for parameter in [*layer.router.parameters(), *(layer.shared_experts or torch.nn.Module()).parameters()]:
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for slot, expert in enumerate(layer.placement.experts_of_rank(transport.rank)):
            generator = torch.Generator().manual_seed(100 + expert)
            for name in ("gate_up", "down"):
                weight = getattr(experts, name)[slot]
                made = torch.randn(weight.shape, generator=generator) * 0.3
                if config.quant.kind == "none":
                    weight.copy_(made)
                else:
                    quantize = quantize_blocks if config.quant.kind == "fp8_block" else quantize_whole_rows
                    codes, getattr(experts, f"{name}_scale")[slot] = quantize(made)
                    weight.copy_(codes)
    return layer


def tokens(config: MoEConfig, count: int) -> Tensor:
    return torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(2))


def run(transport: Transport, config: str | MoEConfig, placement: ExpertPlacement | None = None) -> Tensor:
    """The rank's share of 7 tokens' results."""
    config = CONFIGS[config] if isinstance(config, str) else config
    layer, share = build(config, transport, placement), -(-7 // transport.world_size)
    with torch.no_grad():
        x_TD = tokens(config, 7)[transport.rank * share : (transport.rank + 1) * share]
        return layer(x_TD.to(layer.router.weight.device)).cpu()


def run_in_group(group: EPGroup, name: str) -> Tensor:
    return run(make_transport(group), name)


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_are_those_of_the_exchange(name: str, ranks_of_two: Ranks) -> None:
    expected_TD = run(LocalTransport(), name)
    assert torch.equal(torch.cat(ranks_of_two.run(run_in_group, name)), expected_TD)


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_are_those_of_any_placement(name: str) -> None:
    count = CONFIGS[name].num_experts
    reversed_and_again = ExpertPlacement(count, 1, (*reversed(range(count)), *range(count)))
    assert torch.equal(run(LocalTransport(), name, reversed_and_again), run(LocalTransport(), name))


@pytest.mark.parametrize("name", ["fp8", "fp8_row"])
def test_fp8_is_near_the_product_of_the_unquantised(name: str) -> None:
    """DeepGEMM's measure of two results' distance, of one minus twice their product over their squares."""
    config = replace(CONFIGS[name], quant=QuantSpec())
    exact_TD = run(LocalTransport(), config).double()
    found_TD = run(LocalTransport(), name).double()
    squares = (exact_TD**2).sum() + (found_TD**2).sum()
    assert 1 - 2 * (exact_TD * found_TD).sum() / squares < 5e-3


def test_bits_are_those_of_training(device: torch.device) -> None:
    layer, x_TD = build(PLAIN, LocalTransport()), tokens(PLAIN, 5).to(device)
    with torch.no_grad():
        expected_TD = layer(x_TD)
    assert torch.equal(layer(x_TD).detach(), expected_TD)


def test_a_row_of_nan_stays_alone(device: torch.device) -> None:
    layer, x_TD = build(PLAIN, LocalTransport()), tokens(PLAIN, 5).to(device)
    with torch.inference_mode():
        expected_TD = layer(x_TD)
        spoilt_TD = x_TD.clone()
        spoilt_TD[2] = float("nan")
        found_TD = layer(spoilt_TD)
        assert found_TD[2].isnan().all()  # through the shared expert
        others = [0, 1, 3, 4]
        assert torch.equal(found_TD[others], expected_TD[others])
        assert layer(x_TD[:0]).shape == (0, 48)


@pytest.mark.parametrize(("name", "most"), [("plain", 6), ("fp8", 7), ("fp8_row", 9)])
def test_launches_of_the_routed_path(name: str, most: int, device: torch.device) -> None:
    """Router through combine; a shared expert adds its own."""
    config = CONFIGS[name]
    layer = build(config, LocalTransport())
    layer.shared_experts = None
    x_TD = tokens(config, 5).to(device)
    with torch.inference_mode(), record_launches(x_TD.device) as names:
        layer(x_TD)
    assert len(names) == most, names
