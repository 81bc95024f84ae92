"""The MoE layer against its float64 reference, over world sizes, and its gradients over 1 and 2 ranks."""

import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock import EPGroup, ExpertPlacement, LocalWorld, MoEConfig, MoELayer, make_transport
from crossdock.comm import LocalTransport, Transport
from crossdock.errors import CapacityOverflow, ConfigError, PlanMismatch
from crossdock.gemm import QuantSpec, dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from crossdock.moe import ExchangeConfig, Fp8Experts, moe_ref, sum_replicated_gradients
from crossdock.moe.reference import select_ref
from crossdock.parallel import Topology
from tests.launch import Ranks

DEEPSEEK = MoEConfig(hidden_size=36, expert_size=20, num_experts=8, top_k=3, score="sigmoid", num_groups=4,
                     top_groups=2, scale=2.5, selection_bias=True, shared_size=24)  # fmt: skip
QWEN2 = MoEConfig(
    hidden_size=36, expert_size=20, num_experts=8, top_k=3, renormalize=False, shared_size=24, shared_gate=True
)
CONFIGS = {"deepseek": DEEPSEEK, "qwen2": QWEN2}
TOKENS = 11


def weights(config: MoEConfig) -> dict[str, Tensor]:
    """All of a layer's float32 tensors, by the names of `moe_ref`'s arguments."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    size_D, size_F, size_E, size_S = config.hidden_size, config.expert_size, config.num_experts, config.shared_size
    made = {"router_ED": normal(size_E, size_D), "gate_up_E2FD": normal(size_E, 2 * size_F, size_D),
            "down_EDF": normal(size_E, size_D, size_F), "shared_up": normal(2 * size_S, size_D),
            "shared_down": normal(size_D, size_S)}  # fmt: skip
    if config.selection_bias:
        made["bias_E"] = normal(size_E)
    if config.shared_gate:
        made["shared_gate_1D"] = normal(1, size_D)
    return made


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(count, 36, generator=torch.Generator().manual_seed(2))


def build(config: MoEConfig, transport: Transport, placement: ExpertPlacement | None = None) -> MoELayer:
    """A float32 layer that holds this rank's part of `weights`."""
    layer = MoELayer(config, transport, placement, dtype=torch.float32)
    given = weights(config)
    with torch.no_grad():
        layer.router.weight.copy_(given["router_ED"])
        if layer.router.e_score_correction_bias is not None:
            layer.router.e_score_correction_bias.copy_(given["bias_E"])
        for slot, expert in enumerate(layer.placement.experts_of_rank(transport.rank)):
            if expert >= 0:
                layer.experts.gate_up[slot] = given["gate_up_E2FD"][expert]
                layer.experts.down[slot] = given["down_EDF"][expert]
        shared: Any = layer.shared_experts
        shared.gate_up.copy_(given["shared_up"])
        shared.down.copy_(given["shared_down"])
        if config.shared_gate:
            shared.gate.copy_(given["shared_gate_1D"])
    return layer


def reference(config: MoEConfig, x_TD: Tensor, given: dict[str, Tensor]) -> Tensor:
    shared = (given["shared_up"], given["shared_down"])
    others = {name: given.get(name) for name in ("bias_E", "shared_gate_1D")}
    routed = {name: given[name] for name in ("router_ED", "gate_up_E2FD", "down_EDF")}
    return moe_ref(config, x_TD, **routed, shared=shared, **others)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_float64_reference(name: str) -> None:
    config = CONFIGS[name]
    y_TD = build(config, LocalTransport())(tokens())
    torch.testing.assert_close(y_TD.double(), reference(config, tokens(), weights(config)), rtol=1e-5, atol=1e-5)


def split(world_size: int, kind: str) -> list[slice]:
    """Which tokens each rank holds: shared out, or all with the last rank."""
    if kind == "all with one rank":
        return [slice(0, 0)] * (world_size - 1) + [slice(0, TOKENS)]
    edges = [TOKENS * r // world_size for r in range(world_size + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


PLACEMENTS: dict[str, Callable[[int], ExpertPlacement]] = {
    "contiguous": lambda w: ExpertPlacement(8, w, tuple(range(8)) + (-1,) * (-8 % w)),
    "reversed": lambda w: ExpertPlacement(8, w, tuple(reversed(range(8))) + (-1,) * (-8 % w)),
    "replicas": lambda w: ExpertPlacement(8, w, (tuple(range(8)) + (-1,) * (-8 % w)) if w == 1 else _replicated(w)),
}


def _replicated(world_size: int) -> tuple[int, ...]:
    """Every expert twice, on neighbouring ranks."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    for expert in range(8):
        ranks[expert % world_size].append(expert)
        ranks[(expert + 1) % world_size].append(expert)
    most = max(map(len, ranks))
    return tuple(e for held in ranks for e in held + [-1] * (most - len(held)))


@pytest.mark.parametrize("kind", ["shared out", "all with one rank"])
@pytest.mark.parametrize("placed", PLACEMENTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_bits_do_not_depend_on_the_world_size(name: str, placed: str, kind: str) -> None:
    config = CONFIGS[name]
    expected = build(config, LocalTransport())(tokens()).detach()
    for world_size in (1, 2, 3, 4):
        parts = split(world_size, kind)
        placement = PLACEMENTS[placed](world_size)
        rows = LocalWorld(world_size).run(
            lambda t, parts=parts, placement=placement: build(config, t, placement)(tokens()[parts[t.rank]]).detach()
        )
        assert torch.equal(torch.cat(rows), expected), (world_size, placed, kind)


def gradients(transport: Transport, name: str, kind: str) -> dict[str, Tensor]:
    """Gradients of sum(y * target) after the replicated ones are summed, and of x."""
    config = CONFIGS[name]
    part = split(transport.world_size, kind)[transport.rank]
    target = torch.randn(TOKENS, 36, generator=torch.Generator().manual_seed(3))
    layer = build(config, transport)
    x_TD = tokens()[part].clone().requires_grad_()
    (layer(x_TD) * target[part]).sum().backward()
    sum_replicated_gradients(layer, transport)
    return {"x_TD": x_TD.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def gradients_of_group(group: EPGroup, name: str, kind: str) -> dict[str, Tensor]:
    return gradients(make_transport(group), name, kind)


def dense_gradients(name: str) -> dict[str, Tensor]:
    """The same from the float64 reference, under the layer's parameter names."""
    config = CONFIGS[name]
    given = {n: t.double().requires_grad_(n != "bias_E") for n, t in weights(config).items()}
    x_TD = tokens().double().requires_grad_()
    target = torch.randn(TOKENS, 36, generator=torch.Generator().manual_seed(3))
    (reference(config, x_TD, given) * target).sum().backward()
    names = {"router_ED": "router.weight", "gate_up_E2FD": "experts.gate_up", "down_EDF": "experts.down",
             "shared_up": "shared_experts.gate_up", "shared_down": "shared_experts.down",
             "shared_gate_1D": "shared_experts.gate"}  # fmt: skip
    return {"x_TD": x_TD.grad} | {names[n]: t.grad for n, t in given.items() if t.grad is not None}  # type: ignore[dict-item]


def check_gradients(ranks: list[dict[str, Tensor]], name: str) -> None:
    one = gradients(LocalTransport(), name, "shared out")
    dense = dense_gradients(name)
    assert set(one) == set(dense) == set(ranks[0])
    for key, expected in dense.items():
        sharded = key == "x_TD" or key.startswith("experts.")
        found = torch.cat([grads[key] for grads in ranks]) if sharded else ranks[0][key]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        torch.testing.assert_close(
            found, one[key], rtol=1e-6, atol=1e-5, msg=lambda m, k=key: f"{k} against one rank: {m}"
        )
        assert sharded or all(torch.equal(grads[key], ranks[0][key]) for grads in ranks), f"{key} differs between ranks"


@pytest.mark.parametrize("kind", ["shared out", "all with one rank"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_virtual_ranks(name: str, kind: str) -> None:
    check_gradients(LocalWorld(2).run(lambda t: gradients(t, name, kind)), name)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_two_processes(name: str, ranks_of_two: Ranks) -> None:
    check_gradients(ranks_of_two.run(gradients_of_group, name, "shared out"), name)


def test_check_asks_the_exchange_that_finds_later() -> None:
    """What latency mode on a GPU has found is raised without another call; other forms have nothing to ask."""

    class Stale:
        def check(self) -> None:
            raise CapacityOverflow("rank 1 has 9 rows")

    layer = MoELayer(DEEPSEEK, LocalTransport(), exchange=ExchangeConfig(mode="latency"))
    layer.check()
    layer.dispatcher = Stale()  # type: ignore[assignment]
    with pytest.raises(CapacityOverflow, match="rank 1 has 9 rows"):
        layer.check()


def checked_calls(group: EPGroup) -> list[str]:
    layer = MoELayer(DEEPSEEK, make_transport(group, "symmetric"), exchange=ExchangeConfig(mode="latency"))
    calls: list[str] = []
    layer.dispatcher.check = lambda: calls.append("check")  # type: ignore[attr-defined]
    with torch.no_grad():
        layer(tokens().bfloat16())
    layer.check()
    return calls


def test_check_reaches_the_form_of_latency_mode(ranks_of_two: Ranks) -> None:
    assert ranks_of_two.run(checked_calls) == [["check"]] * 2


def test_load_counts_every_choice() -> None:
    layer = build(DEEPSEEK, LocalTransport())
    layer(tokens())
    layer(tokens())
    assert int(layer.load_E.sum()) == 2 * TOKENS * DEEPSEEK.top_k


def test_fp8_experts_agree_with_their_dequantised_weights() -> None:
    config = MoEConfig(hidden_size=128, expert_size=128, num_experts=4, top_k=2, quant=QuantSpec("fp8_block"))
    layer = MoELayer(config, LocalTransport(), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    layer.router.weight.data.normal_(generator=generator)
    held = layer.experts
    assert isinstance(held, Fp8Experts)
    for name in ("gate_up", "down"):
        q, scale = quantize_blocks(torch.randn(getattr(held, name).shape, generator=generator) * 0.1)
        getattr(held, name).copy_(q)
        getattr(held, f"{name}_scale").copy_(scale)
    x_TD = torch.randn(9, 128, generator=generator).bfloat16()
    found_TD = layer(x_TD).double()
    for x_D, found_D in zip(x_TD, found_TD, strict=True):
        expected_D = torch.zeros(128, dtype=torch.float64)
        for expert, weight in select_ref(config, (layer.router.weight.detach().double() @ x_D.double())):
            gate_up = dequantize_blocks(held.gate_up, held.gate_up_scale)[expert].double() @ as_sent(x_D)
            gate, up = gate_up.to(torch.bfloat16).double().chunk(2)
            down = dequantize_blocks(held.down, held.down_scale)[expert].double()
            expected_D += weight * (down @ as_sent(gate * torch.sigmoid(gate) * up))
        difference = 1 - 2 * (found_D * expected_D).sum() / (found_D.square() + expected_D.square()).sum()
        assert difference < 1e-4


def as_sent(x_K: Tensor) -> Tensor:
    """What is left of an activation row after its quantisation to e4m3."""
    return dequantize_rows(*quantize_rows(x_K[None].float()), torch.float32)[0].double()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"top_k": 9}, "top_k 9 is more than the 4 experts in top_groups 2"),
        ({"num_groups": 3}, "num_experts 8 is no multiple of num_groups 3"),
        ({"top_groups": 5}, "top_groups 5 is more than num_groups 4"),
        ({"top_k": 2.0}, "top_k must be an integer of at least 1, found 2.0"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, found 0"),
        ({"shared_gate": True, "shared_size": 0}, "shared_size is 0"),
    ],
)
def test_config_names_what_cannot_work(options: dict[str, Any], names: str) -> None:
    from dataclasses import replace

    with pytest.raises(ConfigError, match=names):
        replace(DEEPSEEK, **options)


def test_layer_refuses_a_placement_of_another_world() -> None:
    with pytest.raises(ConfigError, match="placement is for 2 ranks, transport has 1"):
        MoELayer(DEEPSEEK, LocalTransport(), ExpertPlacement.contiguous(8, 2))
    with pytest.raises(ConfigError, match="8 experts do not divide over 3 ranks"):
        LocalWorld(3).run(lambda t: MoELayer(DEEPSEEK, t))


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"hierarchy": "node"}])
def test_ranks_with_other_placements_are_told_apart(options: dict[str, Any]) -> None:
    """Equally many slots in another order, as where each rank balances by its own load."""
    other = (*range(2, 8), 0, 1)

    def run(transport: Transport) -> str:
        placed = other if transport.rank == 1 else tuple(range(8))
        layer = MoELayer(
            DEEPSEEK, transport, ExpertPlacement(8, 2, placed), exchange=ExchangeConfig(**options), dtype=torch.float32
        )
        with pytest.raises(PlanMismatch) as caught:
            layer(torch.ones(2, 36))
        return str(caught.value)

    sums = [zlib.crc32(repr(placed).encode()) for placed in (tuple(range(8)), other)]
    for rank, text in enumerate(LocalWorld(2, topology=Topology((0, 1))).run(run)):
        expected = f"checksum of placement is {sums[1 - rank]} on rank {1 - rank}, expected {sums[rank]} as here"
        assert expected in text, text
