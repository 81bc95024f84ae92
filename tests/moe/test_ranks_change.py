"""Replicas chosen anew, and a layer that goes on over other ranks: the bits stay, and so do the weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock import ExpertPlacement, LocalWorld
from crossdock.comm import LocalTransport, Transport
from crossdock.errors import ConfigError
from crossdock.moe import ExchangeConfig
from crossdock.moe.config import FLAT
from crossdock.parallel import Topology
from tests.moe.links import noise
from tests.moe.test_pipeline import TOKENS, build


def tokens() -> Tensor:
    return noise(TOKENS, 36, seed=2)


TWICE = ExpertPlacement(8, 2, (0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 5, 4, 3, 2, 1, 0))  # every expert on both ranks


def test_any_table_of_replicas_gives_the_same_bits() -> None:
    """Here tables of each rank that send all its tokens to its own slots."""

    def run(transport: Transport) -> tuple[Tensor, Tensor, Tensor]:
        layer = build(transport, FLAT, TWICE)
        own = TWICE.experts_of_rank(transport.rank)
        first = transport.rank * TWICE.slots_per_rank
        slots_EX = torch.tensor([[first + own.index(expert)] for expert in range(8)])
        with torch.no_grad():
            before_TD = layer(tokens())
            layer.set_replicas(slots_EX, torch.ones(8, dtype=torch.int64))
            after_TD = layer(tokens())
        routing = layer.router(tokens(), placement_tables=(layer.slots_EX, layer.replicas_E))
        return before_TD, after_TD, routing.slot_ids_TK

    expected_TD = build(LocalTransport(), FLAT)(tokens()).detach()
    for rank, (before_TD, after_TD, slots_TK) in enumerate(LocalWorld(2).run(run)):
        assert torch.equal(before_TD, expected_TD) and torch.equal(after_TD, expected_TD)
        assert set((slots_TK // 8).flatten().tolist()) == {rank}


@pytest.mark.parametrize(
    ("slots_EX", "replicas_E", "names"),
    [
        ([[0]] * 8, [1] * 8, "expert 1 to slot 0, which does not hold it"),
        ([[e, 16] for e in range(8)], [2] * 8, "expert 0 to slot 16"),
        ([[e] for e in range(8)], [1] * 7 + [0], "expert 7 must have 1 to 1 replicas, found 0"),
        ([[e] for e in range(8)], [1] * 7, r"shapes \[8, X\] and \[8\], found \[8, 1\] and \[7\]"),
    ],
)
def test_a_table_that_is_wrong_is_refused(slots_EX: list[list[int]], replicas_E: list[int], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        LocalWorld(2).run(
            lambda t: build(t, FLAT, TWICE).set_replicas(torch.tensor(slots_EX), torch.tensor(replicas_E))
        )


def test_near_replicas_are_taken_as_far_as_the_load_allows() -> None:
    """Four ranks on two nodes hold each expert once a node: what left the node before stays in it after, bits too."""
    placement = ExpertPlacement(8, 4, (0, 1, 2, 3, 4, 5, 6, 7) * 2)

    def run(transport: Transport) -> tuple[Tensor, Tensor, int, int]:
        layer = build(transport, FLAT, placement)
        far = [0, 0]
        results = []
        with torch.no_grad():
            for turn in range(2):
                results.append(layer(tokens()))
                slots_TK = layer.router(tokens(), placement_tables=(layer.slots_EX, layer.replicas_E)).slot_ids_TK
                far[turn] = int((slots_TK // 8 != transport.rank // 2).sum())
                layer.prefer_near_replicas(slack=0.5)
        return results[0], results[1], far[0], far[1]

    expected_TD = build(LocalTransport(), FLAT)(tokens()).detach()
    for before_TD, after_TD, far_before, far_after in LocalWorld(4, topology=Topology((0, 0, 1, 1))).run(run):
        assert torch.equal(before_TD, expected_TD) and torch.equal(after_TD, expected_TD)
        assert far_before > 0 and far_after == 0
    alone = build(LocalTransport(), FLAT)
    alone.prefer_near_replicas()
    assert not alone.choose_replicas, "without replicas there is nothing to choose"


@pytest.mark.parametrize("options", [{}, {"chunks": 3}])
def test_a_layer_goes_on_without_a_rank(options: dict[str, Any]) -> None:
    """Its experts have replicas elsewhere, so what is left gives the bits of a world of one."""
    left = ExpertPlacement(8, 2, (0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 0, 1, 2, 3))
    three = ExpertPlacement(8, 3, (*left.physical_to_logical, 0, 1, 2, 3, -1, -1, -1, -1))

    def run(transport: Transport) -> Tensor | None:
        layer = build(transport, ExchangeConfig(**options), three)
        with torch.no_grad():
            layer(tokens())
            others = transport.split([[0, 1], [2]])
            if transport.rank == 2:
                return None
            weights = {name: value.clone() for name, value in layer.state_dict().items()}
            layer.continue_on(others, left)
            assert all(torch.equal(value, weights[name]) for name, value in layer.state_dict().items())
            return layer(tokens())

    expected_TD = build(LocalTransport(), FLAT)(tokens()).detach()
    first_TD, second_TD, none = LocalWorld(3).run(run)
    assert torch.equal(first_TD, expected_TD) and torch.equal(second_TD, expected_TD)
    assert none is None


def test_weights_do_not_move_when_ranks_change() -> None:
    layer = build(LocalTransport(), FLAT)
    reversed_order = ExpertPlacement(8, 1, tuple(reversed(range(8))))
    with pytest.raises(ConfigError, match=r"slots hold experts \[0, 1, 2, 3, 4, 5, 6, 7\], the new placement has \[7,"):
        layer.continue_on(LocalTransport(), reversed_order)
    assert layer(tokens()).shape == (TOKENS, 36), "it is as it was"


def test_ranks_left_on_unequal_nodes_need_another_exchange() -> None:
    """Of two nodes with two ranks each, one rank is gone; the layer says so, stays as it was, and goes on when told."""
    held = (0, 1, 2, 3, 4, 5, 6, 7) * 4

    def run(transport: Transport) -> Tensor | None:
        layer = build(transport, ExchangeConfig(hierarchy="node"), ExpertPlacement(8, 4, held))
        others = transport.split([[0, 1, 2], [3]])
        if transport.rank == 3:
            return None
        left = ExpertPlacement(8, 3, held[:24])
        with pytest.raises(ConfigError, match="equally many ranks on each, found 2, 1"):
            layer.continue_on(others, left)
        assert layer.placement.world_size == 4 and layer.dispatcher.transport is transport
        layer.continue_on(others, left, FLAT)
        return layer(tokens()).detach()

    expected_TD = build(LocalTransport(), FLAT)(tokens()).detach()
    for found_TD in LocalWorld(4, topology=Topology((0, 0, 1, 1))).run(run)[:3]:
        assert found_TD is not None and torch.equal(found_TD, expected_TD)
