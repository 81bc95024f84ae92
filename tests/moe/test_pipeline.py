"""Chunks: the bits of the undivided layer, the order in which rows leave, their number, and how much they hide."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from crossdock import EPGroup, ExpertPlacement, LocalWorld, MoEConfig, MoELayer, make_transport
from crossdock.comm import LocalTransport, Transport
from crossdock.errors import ConfigError, PlanMismatch
from crossdock.gemm import QuantSpec
from crossdock.moe import ExchangeConfig, sum_replicated_gradients
from crossdock.moe.pace import chunk_shares
from crossdock.moe.pipeline import chunk_slices
from crossdock.parallel import Topology
from tests.launch import Ranks
from tests.moe.links import Noting, Slow, noise

CONFIG = MoEConfig(hidden_size=36, expert_size=20, num_experts=8, top_k=3, score="sigmoid", scale=2.5, shared_size=24)
TOKENS = 23
REPLICATED = ExpertPlacement(8, 2, (0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 0, 1))


def build(
    transport: Transport, exchange: ExchangeConfig, placement: ExpertPlacement | None = None, config: MoEConfig = CONFIG
) -> MoELayer:
    """A float32 layer in which expert e is the same wherever it stands."""
    layer = MoELayer(config, transport, placement, exchange=exchange, dtype=torch.float32)
    experts: Any = layer.experts
    shared: Any = layer.shared_experts
    with torch.no_grad():
        layer.router.weight.copy_(noise(*layer.router.weight.shape, seed=1))
        for slot, expert in enumerate(layer.placement.experts_of_rank(transport.rank)):
            experts.gate_up[slot] = noise(*experts.gate_up.shape[1:], seed=100 + expert)
            experts.down[slot] = noise(*experts.down.shape[1:], seed=200 + expert)
        if shared is not None:
            shared.gate_up.copy_(noise(*shared.gate_up.shape, seed=3))
            shared.down.copy_(noise(*shared.down.shape, seed=4))
    return layer


def shares(counts: list[int]) -> list[slice]:
    ends = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
    return [slice(*edge) for edge in pairwise(ends)]


def forward(
    transport: Transport, counts: list[int], exchange: ExchangeConfig, placement: ExpertPlacement | None = None
) -> Tensor:
    """What the layer gives for this rank's share, twice over: an adaptive number of chunks may differ."""
    x_TD = noise(sum(counts), 36, seed=2)[shares(counts)[transport.rank]]
    layer = build(transport, exchange, placement)
    with torch.no_grad():
        first_TD, second_TD = layer(x_TD), layer(x_TD)
    assert torch.equal(first_TD, second_TD)
    return first_TD


def forward_in_group(group: EPGroup, counts: list[int], exchange: ExchangeConfig) -> Tensor:
    return forward(make_transport(group), counts, exchange)


COUNTS = {1: [[TOKENS]], 2: [[12, 11], [0, TOKENS]], 4: [[6, 0, 16, 1], [0, 0, 0, TOKENS]]}


@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 0])
@pytest.mark.parametrize("world_size", COUNTS)
def test_bits_do_not_depend_on_chunks(world_size: int, chunks: int) -> None:
    expected_TD = forward(LocalTransport(), [TOKENS], ExchangeConfig())
    for counts in COUNTS[world_size]:
        exchange = ExchangeConfig(chunks=chunks)
        rows = LocalWorld(world_size).run(lambda t, c=counts, e=exchange: forward(t, c, e))
        assert torch.equal(torch.cat(rows), expected_TD), counts


@pytest.mark.parametrize("chunks", [2, 7])
def test_bits_do_not_depend_on_chunks_with_replicas(chunks: int) -> None:
    expected_TD = forward(LocalTransport(), [TOKENS], ExchangeConfig())
    exchange = ExchangeConfig(chunks=chunks)
    rows = LocalWorld(2).run(lambda t: forward(t, [9, 14], exchange, REPLICATED))
    assert torch.equal(torch.cat(rows), expected_TD)


@pytest.mark.parametrize("counts", COUNTS[4])
@pytest.mark.parametrize("quant", ["none", "fp8_block"])
@pytest.mark.parametrize("wire", ["native", "fp8"])
def test_bits_do_not_depend_on_portions(
    wire: Literal["native", "fp8"], quant: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks without tokens, or without near rows; FP8 experts take codes, one row of them for several slots."""
    monkeypatch.setattr("crossdock.comm.once.WORTH_BYTES", -1)
    shared_size = 24 if quant == "none" else 0
    config = MoEConfig(256, 128, num_experts=8, top_k=3, shared_size=shared_size, quant=QuantSpec(quant))

    def run(transport: Transport, portions: int) -> Tensor:
        layer = build(transport, ExchangeConfig("node", wire, chunks=0), config=config)
        assert layer.pipeline.pace is not None
        layer.pipeline.pace.choose = lambda *_: (1, portions)  # type: ignore[method-assign]
        x_TD = noise(sum(counts), 256, seed=2)[shares(counts)[transport.rank]]
        with torch.no_grad():
            y_TD: Tensor = layer(x_TD)
        return y_TD

    world = LocalWorld(4, topology=Topology((0, 0, 1, 1)))
    whole, *others = (torch.cat(world.run(lambda t, n=n: run(t, n))) for n in (1, 2, 5))
    assert whole.abs().sum() > 0
    for rows_TD in others:
        assert torch.equal(rows_TD, whole)


def test_ranks_may_differ_in_whether_they_ask_for_gradients() -> None:
    """Those that do take the first chunk whole, the others in portions: rows leave in the same order on all."""

    def run(transport: Transport, with_gradients: tuple[int, ...]) -> Tensor:
        layer = build(transport, ExchangeConfig(chunks=2, hierarchy="node"))
        x_TD = noise(TOKENS, 36, seed=2)[shares([6, 0, 16, 1])[transport.rank]]
        with torch.set_grad_enabled(transport.rank in with_gradients):
            y_TD: Tensor = layer(x_TD).detach()
        return y_TD

    world = LocalWorld(4, topology=Topology((0, 0, 1, 1)))
    expected_TD = torch.cat(world.run(lambda transport: run(transport, ())))
    for some in ((0,), (1, 2)):
        assert torch.equal(torch.cat(world.run(lambda transport, some=some: run(transport, some))), expected_TD)


@pytest.mark.parametrize("options", [{"wire": "fp8"}, {"hierarchy": "node"}, {"wire": "fp8", "hierarchy": "node"}])
def test_bits_do_not_depend_on_chunks_in_other_forms(options: dict[str, Any]) -> None:
    """Over two nodes, where the sum over nodes has an order of its own: against the same form undivided."""
    world = LocalWorld(4, topology=Topology((0, 0, 1, 1)))
    whole, *divided = (
        torch.cat(world.run(lambda t, n=n: forward(t, [6, 0, 16, 1], ExchangeConfig(chunks=n, **options))))
        for n in (1, 2, 3, 7)
    )
    for rows_TD in divided:
        assert torch.equal(rows_TD, whole)


def test_bits_do_not_depend_on_chunks_between_processes(ranks_of_two: Ranks) -> None:
    expected_TD = forward(LocalTransport(), [TOKENS], ExchangeConfig())
    for chunks in (3, 0):
        rows = ranks_of_two.run(forward_in_group, [4, 19], ExchangeConfig(chunks=chunks))
        assert torch.equal(torch.cat(rows), expected_TD), chunks


def gradients(
    transport: Transport, counts: list[int], chunks: int, hierarchy: Literal["flat", "node"] = "flat"
) -> dict[str, Tensor]:
    part = shares(counts)[transport.rank]
    layer = build(transport, ExchangeConfig(chunks=chunks, hierarchy=hierarchy))
    x_TD = noise(sum(counts), 36, seed=2)[part].clone().requires_grad_()
    (layer(x_TD) * noise(sum(counts), 36, seed=5)[part]).sum().backward()
    sum_replicated_gradients(layer, transport)
    assert x_TD.grad is not None
    return {"x_TD": x_TD.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def gradients_in_group(group: EPGroup, counts: list[int], chunks: int) -> dict[str, Tensor]:
    return gradients(make_transport(group), counts, chunks)


def check_gradients(ranks: list[dict[str, Tensor]]) -> None:
    """To rounding: a weight's gradient is a sum over tokens, and chunks are summed one after another."""
    one = gradients(LocalTransport(), [TOKENS], 1)
    for name, expected in one.items():
        is_sharded = name == "x_TD" or name.startswith("experts.")
        found = torch.cat([rank[name] for rank in ranks]) if is_sharded else ranks[0][name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunks", [2, 7, 0])
@pytest.mark.parametrize("counts", [[12, 11], [TOKENS, 0]])
def test_gradients_do_not_depend_on_chunks(counts: list[int], chunks: int) -> None:
    check_gradients(LocalWorld(2).run(lambda t: gradients(t, counts, chunks)))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("counts", [[7, 5, 8, 3], [TOKENS, 0, 0, 0]])
def test_gradients_over_nodes_do_not_depend_on_chunks(counts: list[int], chunks: int) -> None:
    world = LocalWorld(4, topology=Topology((0, 0, 1, 1)))
    check_gradients(world.run(lambda t: gradients(t, counts, chunks, "node")))


def test_gradients_do_not_depend_on_chunks_between_processes(ranks_of_two: Ranks) -> None:
    check_gradients(ranks_of_two.run(gradients_in_group, [TOKENS, 0], 3))


def test_rows_leave_ahead_of_products() -> None:
    """Plans first, then two dispatches, and from then on each product is between a dispatch and a combine under way."""

    def notes(transport: Transport) -> list[str]:
        noting = Noting(transport)
        layer = build(noting, ExchangeConfig(chunks=4))
        for module, name in ((layer.experts, "experts"), (layer.shared_experts, "shared")):
            assert module is not None
            module.register_forward_pre_hook(lambda *_, name=name: noting.notes.append(name))
        with torch.no_grad():
            layer(noise(TOKENS, 36, seed=2))
        plans = [note for note in noting.notes if note.startswith("plan")]
        assert noting.notes[: len(plans)] == plans
        return noting.notes[len(plans) :]

    first, second = LocalWorld(2).run(notes)
    d, c = ([f"{what} of exchange {n}" for n in (1, 2, 3, 4)] for what in ("dispatch", "combine"))
    expected = [d[0], d[1], "shared", "experts", c[0], d[2], "experts", c[1], d[3], "experts", c[2], "experts", c[3]]
    assert first == second == expected


def test_near_rows_are_computed_while_the_first_far_ones_fly() -> None:
    """Over nodes: all chunks' far rows leave first, and the first chunk's near rows do not wait for any of them.

    What is to be known of the far rows has crossed by then, for all chunks in one exchange.
    """

    def notes(transport: Transport) -> tuple[list[str], list[int]]:
        noting = Noting(transport)
        layer = build(noting, ExchangeConfig(chunks=3, hierarchy="node"))
        rails: Any = layer.dispatcher
        rails.rail = replace(rails.rail, transport=Noting(rails.rail.transport))
        rows: list[int] = []
        layer.experts.register_forward_pre_hook(lambda _, given: rows.append(int(given[0].ends_L[-1])))
        layer.experts.register_forward_pre_hook(lambda *_: rails.rail.transport.notes.append("experts"))
        with torch.no_grad():
            layer(noise(TOKENS, 36, seed=2))
        return rails.rail.transport.notes, rows

    for found, rows in LocalWorld(4, topology=Topology((0, 0, 1, 1))).run(notes):
        between, (plan, *found) = " between nodes of exchange", found
        assert plan == f"plan{between} 1"
        sent, back = ([f"{what}{between} {n}" for n in (1, 2, 3)] for what in ("dispatch", "combine"))
        assert found[:3] == sent
        assert found[3:6] == ["experts"] * 3, "near and far of the first chunk, then the second"
        assert found[6:] == [back[0], "experts", back[1], back[2]]
        assert len(rows) == 4 and sum(rows) > rows[0] > 0


@pytest.mark.parametrize("tokens", [0, 1, 3, 12, 4096])
@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 8])
def test_chunks_divide_all_tokens(tokens: int, chunks: int) -> None:
    parts = chunk_slices(tokens, chunks)
    assert [t for part in parts for t in range(tokens)[part]] == list(range(tokens))
    assert len(parts) == chunks
    for share, part in zip(chunk_shares(chunks), parts, strict=True):  # the cost model's are the pipeline's
        assert abs(part.stop - part.start - share * tokens) <= 1


def with_chunks(transport: Transport, chunks: tuple[int, int]) -> Tensor:
    return forward(transport, [12, 11], ExchangeConfig(chunks=chunks[transport.rank]))


def with_chunks_in_group(group: EPGroup, chunks: tuple[int, int]) -> None:
    with pytest.raises(PlanMismatch, match=f"rank {1 - group.rank}"):
        with_chunks(make_transport(group), chunks)


@pytest.mark.parametrize("chunks", [(2, 3), (0, 1), (3, 0)])
def test_ranks_with_other_chunks_are_told_apart(chunks: tuple[int, int]) -> None:
    with pytest.raises(PlanMismatch, match=r"rank [01]"):
        LocalWorld(2, timeout_s=20).run(lambda t: with_chunks(t, chunks))


@pytest.mark.parametrize("chunks", [(0, 1), (3, 0)])
def test_ranks_with_other_chunks_are_told_apart_between_processes(chunks: tuple[int, int]) -> None:
    with Ranks(2, timeout_s=20.0) as ranks:
        ranks.run(with_chunks_in_group, chunks)


def test_links_are_measured_by_rows_of_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over nodes the first chunk comes in portions: once rows have crossed, and not before, is their time taken."""

    def notes(transport: Transport, chosen: tuple[int, int]) -> list[str]:
        layer, found = build(transport, ExchangeConfig(chunks=0, hierarchy="node")), list[str]()
        pace = layer.pipeline.pace
        assert pace is not None
        monkeypatch.setattr(pace, "choose", lambda *_: chosen)
        monkeypatch.setattr(pace, "saw_exchange", lambda sent, *_: found.append(f"measured {len(sent)}"))
        monkeypatch.setattr(pace, "saw_products", lambda *_, passes: found.append(f"{passes} passes"))
        layer.experts.register_forward_pre_hook(lambda *_: found.append("experts"))
        with torch.no_grad():
            layer(noise(TOKENS, 36, seed=2))
        return found

    world = LocalWorld(4, topology=Topology((0, 0, 1, 1)))
    one = ["experts", "1 passes"]
    for found in world.run(lambda transport: notes(transport, (3, 2))):
        assert found == ["experts", "measured 3", "experts", "2 passes", *one, *one]
    for found in world.run(lambda transport: notes(transport, (1, 5))):
        assert found == ["experts", "measured 1", *["experts"] * 4, "2 passes"]
    for found in world.run(lambda transport: notes(transport, (1, 1))):
        assert found == ["measured 1", *one]


def test_slow_links_are_learned_whatever_the_portions() -> None:
    """Where rows come late, none of the waits for them is left out."""

    def learned(transport: Transport, portions: int) -> float:
        slow = Slow(transport, 1e-4)
        layer = build(slow, ExchangeConfig(chunks=0, hierarchy="node"))  # type: ignore[arg-type]
        pace = layer.pipeline.pace
        assert pace is not None
        pace.choose = lambda *_: (1, portions)  # type: ignore[method-assign]
        pace.rates = replace(pace.rates, exchange_s=0.0)  # so that a few rows are enough to learn from
        with torch.no_grad():
            layer(noise(TOKENS, 36, seed=2))
        travel, other = (pace.amid, pace.in_chunks) if portions == 5 else (pace.in_chunks, pace.amid)
        assert travel.exchange.is_known and not other.exchange.is_known
        return travel.exchange.value

    for portions in (1, 2, 5):
        world = LocalWorld(2, topology=Topology((0, 1)))
        assert min(world.run(lambda t, n=portions: learned(t, n))) > 10, portions  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"mode": "latency", "chunks": 2}, "chunks must be 1, found 2"),
        ({"mode": "latency", "hierarchy": "node"}, "hierarchy must be 'flat', found 'node'"),
        ({"capacity": 5}, "capacity bound the buffers of mode 'latency'"),
        ({"chunks": -1}, "chunks must be an integer of at least 0, found -1"),
        ({"hierarchy": "rack"}, "hierarchy must be one of flat, node, found 'rack'"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        ExchangeConfig(**options)


def test_latency_mode_needs_its_transport() -> None:
    with pytest.raises(ConfigError, match="needs transport 'symmetric', found 'local'"):
        LocalWorld(2).run(lambda t: build(t, ExchangeConfig(mode="latency")))
