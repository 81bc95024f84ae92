"""The balancer: EPLB's inputs and outputs, placements that are valid, and loads near the bound."""

import doctest
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import ConfigError
from crossdock.parallel import ExpertPlacement, balance_report, balancedness, balancer, lower_bound, rebalance


def test_worked_example_is_true() -> None:
    assert doctest.testmod(balancer).failed == 0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 8), st.integers(1, 6), st.integers(0, 4),
       st.integers(0, 99))  # fmt: skip
def test_every_layer_is_a_valid_placement(nodes: int, gpus: int, groups: int, size: int, extra: int, seed: int) -> None:
    world, experts = nodes * gpus, groups * size
    slots = (-(-experts // world) + extra) * world
    weight = torch.rand(2, experts, generator=torch.Generator().manual_seed(seed)).pow(5) * 100
    phy2log, log2phy, count = rebalance(weight, slots, groups, nodes, world)
    assert phy2log.shape == (2, slots) and count.sum(1).tolist() == [slots, slots]
    report = balance_report(weight, phy2log, world)
    for layer in range(2):
        placement = ExpertPlacement(experts, world, tuple(phy2log[layer].tolist()))  # raises for doubled replicas
        width = placement.logical_to_physical_EX.shape[1]
        assert torch.equal(log2phy[layer, :, :width], placement.logical_to_physical_EX)
        assert torch.equal(count[layer], placement.replica_count_E)
        assert max(report.load_NW[layer]) >= report.bound_N[layer] * (1 - 1e-12)


def test_load_comes_near_the_bound_at_the_size_of_deepseek_v3() -> None:
    torch.manual_seed(0)
    excess = []
    for _ in range(8):
        weight = torch.distributions.Gamma(2.0, 1.0).sample((4, 256))
        phy2log, _, _ = rebalance(weight, 288, 8, 4, 32)
        report = balance_report(weight, phy2log, 32)
        excess += [max(load) / bound for load, bound in zip(report.load_NW, report.bound_N, strict=True)]
    assert max(excess) <= 1.2 and median(excess) <= 1.06  # of 400 such: 1.16 and 1.04


def test_hierarchical_keeps_a_group_on_one_node() -> None:
    phy2log, _, _ = rebalance(torch.rand(1, 32), 40, 4, 2, 4)
    for group in range(4):
        nodes = {slot // 20 for slot, e in enumerate(phy2log[0].tolist()) if e // 8 == group}
        assert len(nodes) == 1


def test_more_slots_than_ranks_could_tell_apart() -> None:
    """Twice the same expert on one rank, where nothing else can be; also in a layer that no token went to."""
    for weight in (torch.zeros(1, 3), torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]])):
        phy2log, _, count = rebalance(weight, 8, 1, 1, 2)
        assert phy2log.shape == (1, 8) and int(count.sum()) == 8 and int(count.min()) >= 1
        for expert in range(3):
            assert phy2log[0].tolist().count(expert) == count[0, expert]


def test_an_empty_slot_has_no_load() -> None:
    report = balance_report(torch.tensor([[6.0, 4.0]]), torch.tensor([[0, 1, 1, -1]]), 2)
    assert report.load_NW == [[8.0, 2.0]]


def test_balancedness_is_over_ranks() -> None:
    assert balancedness([1.0, 1.0]) == 1.0 and balancedness([4.0, 0.0]) == 0.5 and balancedness([0.0, 0.0]) == 1.0
    assert lower_bound([8.0, 1.0], 2, 2) == 8.0 and lower_bound([8.0, 1.0], 4, 2) == 4.5


@pytest.mark.parametrize(
    ("weight", "sizes", "names"),
    [
        (torch.ones(1, 8), (7, 1, 1, 1), "7 is less than the 8"),
        (torch.ones(1, 8), (9, 1, 1, 2), "num_replicas 9 does not divide by 2"),
        (torch.ones(1, 8), (8, 3, 1, 2), "experts 8 does not divide by 3"),
        (torch.ones(1, 8), (8, 1, 2, 1), "num_gpus 1 does not divide by 2"),
        (torch.tensor([[1.0, float("nan")]]), (2, 1, 1, 1), "finite"),
        (torch.ones(8), (8, 1, 1, 1), "shape"),
    ],
)
def test_bad_input_is_named(weight: torch.Tensor, sizes: tuple[int, int, int, int], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        rebalance(weight, *sizes)
