"""Nearest replicas: every slot's load stays within its slack, near slots come first, no bit of a layer changes."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock import LocalWorld
from crossdock.comm import Transport
from crossdock.errors import ConfigError
from crossdock.moe import MoEConfig, MoELayer
from crossdock.parallel import ExpertPlacement, Topology, nearest, rebalance
from crossdock.parallel.nearest import nearest_replicas

PLACEMENT = ExpertPlacement(3, 4, (0, 1, 0, 2))  # expert 0 on ranks 0 and 2, one slot a rank
NODES = Topology((0, 0, 1, 1))


def test_doctests() -> None:
    found = doctest.testmod(nearest)
    assert found.attempted > 3 and found.failed == 0


@st.composite
def clusters(draw: st.DrawFn) -> tuple[ExpertPlacement, Topology, Tensor, float]:
    nodes, ranks_each, per_rank = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks = nodes * ranks_each
    experts = draw(st.integers(1, ranks * per_rank))
    load_WE = torch.tensor([[draw(st.integers(0, 50)) for _ in range(experts)] for _ in range(ranks)]).double()
    phy2log, _, _ = rebalance(load_WE.sum(0)[None], ranks * per_rank, 1, 1, ranks)
    order = draw(st.permutations([node for node in range(nodes) for _ in range(ranks_each)]))
    placement = ExpertPlacement(experts, ranks, tuple(phy2log[0].tolist()))
    return placement, Topology.from_names(tuple(order)), load_WE, draw(st.sampled_from([0.0, 0.05, 0.3, 2.0]))


@settings(deadline=None, max_examples=120)
@given(clusters())
def test_no_slot_gets_more_than_its_slack(cluster: tuple[ExpertPlacement, Topology, Tensor, float]) -> None:
    placement, topology, load_WE, slack = cluster
    load_P = torch.zeros(placement.num_slots, dtype=torch.float64)
    for rank in range(placement.world_size):
        slots_EX, count_E = nearest_replicas(placement, topology, rank, load_WE, slack)
        assert slots_EX.dtype == count_E.dtype == torch.int64 and int(count_E.min()) >= 1
        for expert, (slots, count) in enumerate(zip(slots_EX.tolist(), count_E.tolist(), strict=True)):
            assert all(slot == -1 for slot in slots[count:])
            for slot in slots[:count]:
                assert placement.physical_to_logical[slot] == expert
                load_P[slot] += load_WE[rank, expert] / count
    for expert, replicas in enumerate(placement.replica_count_E.tolist()):
        held = [slot for slot, of in enumerate(placement.physical_to_logical) if of == expert]
        even = float(load_WE[:, expert].sum()) / replicas
        assert load_P[held].max() <= (1 + slack) * even * (1 + 1e-6) + 1e-12


@settings(deadline=None, max_examples=60)
@given(clusters())
def test_with_room_enough_everyone_takes_the_nearest(cluster: tuple[ExpertPlacement, Topology, Tensor, float]) -> None:
    placement, topology, load_WE, _ = cluster
    for rank in range(placement.world_size):
        slots_EX, count_E = nearest_replicas(placement, topology, rank, load_WE, 1000.0)
        for expert, (slots, count) in enumerate(zip(slots_EX.tolist(), count_E.tolist(), strict=True)):
            reach = {
                slot: (slot // placement.slots_per_rank != rank)
                + (not topology.same_node(slot // placement.slots_per_rank, rank))
                for slot, of in enumerate(placement.physical_to_logical)
                if of == expert
            }
            assert {reach[slot] for slot in slots[:count]} == {min(reach.values())}


def test_own_rank_then_own_node_then_beyond() -> None:
    tables = [nearest_replicas(PLACEMENT, NODES, rank, [1.0, 1.0, 1.0])[0][0].tolist() for rank in range(4)]
    assert tables == [[0], [0], [2], [2]]
    apart = Topology((0, 1, 2, 3))  # ranks 1 and 3 have expert 0 on no rank of theirs: both halves
    slots_EX, count_E = nearest_replicas(PLACEMENT, apart, 1, [1.0, 1.0, 1.0])
    assert slots_EX[0, : count_E[0]].tolist() == [0, 2]


def test_what_is_too_much_goes_the_least_way() -> None:
    """Expert 0 on ranks 0, 1 and 2: rank 0's tokens move to rank 1, on its node, before any to rank 2."""
    placement = ExpertPlacement(2, 4, (0, 0, 0, 1))
    load_WE = [[9.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 1.0]]
    slots_EX, count_E = nearest_replicas(placement, NODES, 0, load_WE, 0.05)
    assert (slots_EX[0, : count_E[0]].bincount(minlength=4) * 24 // count_E[0]).tolist() == [11, 11, 2, 0]


def test_parts_are_spread_over_the_tokens() -> None:
    placement = ExpertPlacement(1, 2, (0, 0))
    slots_EX, count_E = nearest_replicas(placement, Topology((0, 0)), 0, [[3.0], [1.0]], 0.0)
    assert slots_EX[0, : count_E[0]].tolist() == [0, 1, 0]  # two thirds at home: 2 of each


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"load": [1.0, 2.0]}, r"load must be \[3\] or \[4, 3\], found \[2\]"),
        ({"load": [1.0, -2.0, 1.0]}, "load must be finite and at least 0"),
        ({"slack": -0.1}, "slack must be a number of at least 0, found -0.1"),
        ({"rank": 4}, r"rank must be in 0\.\.3, found 4"),
        ({"topology": Topology((0, 0))}, "placement is for 4 ranks, topology places 2"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], names: str) -> None:
    arguments = {"placement": PLACEMENT, "topology": NODES, "rank": 0, "load": [1.0, 1.0, 1.0]} | change
    with pytest.raises(ConfigError, match=names):
        nearest_replicas(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("slack", [0.0, 0.1, 10.0])
def test_no_bit_of_a_layer_changes(slack: float) -> None:
    config = MoEConfig(32, 16, 6, 2)
    placement = ExpertPlacement(6, 4, (0, 1, 2, 3, 4, 0, 5, 1, 2, 0, 3, -1))

    def run(transport: Transport, near: bool) -> tuple[Tensor, list[int]]:
        layer = MoELayer(config, transport, placement, dtype=torch.float32).requires_grad_(False)
        for name, shape in (("gate_up", (32, 32)), ("down", (32, 16))):
            for slot, held in enumerate(placement.experts_of_rank(transport.rank)):
                generator = torch.Generator().manual_seed(held + 1)
                getattr(layer.experts, name)[slot] = torch.randn(shape, generator=generator) * (held >= 0)
        layer.router.weight.copy_(torch.randn(6, 32, generator=torch.Generator().manual_seed(99)))
        x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(200 + transport.rank))
        if near:
            slots_EX, count_E = nearest_replicas(placement, NODES, transport.rank, [1.0] * 6, slack)
            layer.set_replicas(slots_EX, count_E)
        routing = layer.router(x_TD, placement_tables=(layer.slots_EX, layer.replicas_E))
        assert routing.slot_ids_TK is not None
        return layer(x_TD), [int(slot) // 3 for slot in routing.slot_ids_TK.flatten()]

    world = LocalWorld(4, topology=NODES)
    in_turn, nearby = world.run(lambda t: run(t, False)), world.run(lambda t: run(t, True))
    for (y_TD, _), (expected_TD, _) in zip(nearby, in_turn, strict=True):
        assert torch.equal(y_TD, expected_TD)
    left, left_in_turn = (
        sum(not NODES.same_node(there, rank) for rank, (_, taken) in enumerate(found) for there in taken)
        for found in (nearby, in_turn)
    )
    assert left <= left_in_turn and (slack < 10 or left < left_in_turn)
