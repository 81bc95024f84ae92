"""Gradients of experts that several ranks hold: summed over their replicas, and the same bits on all of them."""

import re

import pytest
import torch
from torch import Tensor

from crossdock import EPGroup, ExpertPlacement, LocalWorld, MoELayer
from crossdock.comm import LocalTransport, Transport, make_transport
from crossdock.errors import ConfigError, PlanMismatch
from crossdock.moe import sum_replicated_gradients
from tests.launch import Ranks
from tests.moe.test_layer import DEEPSEEK, TOKENS, build, dense_gradients, split, tokens

REPLICAS = {
    "all on two ranks": ExpertPlacement(8, 2, (*range(8), *range(8))),
    "some on three ranks": ExpertPlacement(8, 3, (0, 1, 2, 3, -1, 3, 4, 5, 0, 6, 7, 0, 3, 4, 1)),
}


def replica_gradients(transport: Transport, placement: ExpertPlacement) -> dict[str, Tensor]:
    part = split(transport.world_size, "shared out")[transport.rank]
    target = torch.randn(TOKENS, 36, generator=torch.Generator().manual_seed(3))
    layer = build(DEEPSEEK, transport, placement)
    (layer(tokens()[part]) * target[part]).sum().backward()
    sum_replicated_gradients(layer, transport)
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("placed", REPLICAS)
def test_replicas_of_an_expert_get_one_gradient(placed: str) -> None:
    """That of all ranks' rows, as on one rank; to the bit the same on all replicas, so that they stay the same."""
    placement = REPLICAS[placed]
    ranks = LocalWorld(placement.world_size).run(lambda t: replica_gradients(t, placement))
    one, dense = replica_gradients(LocalTransport(), ExpertPlacement.contiguous(8, 1)), dense_gradients("deepseek")
    first: dict[tuple[str, int], Tensor] = {}
    for rank, found in enumerate(ranks):
        assert set(found) == set(one)
        for name in ("experts.gate_up", "experts.down"):
            for slot, expert in enumerate(placement.experts_of_rank(rank)):
                if expert < 0:
                    assert not found[name][slot].any()
                    continue
                torch.testing.assert_close(found[name][slot], one[name][expert], rtol=1e-6, atol=1e-5)
                torch.testing.assert_close(found[name][slot].double(), dense[name][expert], rtol=1e-5, atol=1e-5)
                assert torch.equal(found[name][slot], first.setdefault((name, expert), found[name][slot]))


def test_replicas_that_share_a_rank_get_one_gradient() -> None:
    """As where the other rank's experts were left without it."""
    placement = ExpertPlacement(8, 2, (*range(8), *range(8))).without([1])
    twice = ExpertPlacement(8, 1, (*placement.physical_to_logical, *range(8)))
    found, one = (replica_gradients(LocalTransport(), placed) for placed in (twice, placement))
    for name in ("experts.gate_up", "experts.down"):
        assert torch.equal(found[name][:8], found[name][8:])
        torch.testing.assert_close(found[name][:8], one[name], rtol=1e-6, atol=1e-5)


def test_gradients_over_other_ranks_than_the_layers_are_refused() -> None:
    model = torch.nn.ModuleDict({"moe": MoELayer(DEEPSEEK, LocalTransport())})
    with pytest.raises(ConfigError, match="layer 'moe' stand on 1 ranks, but gradients are to be summed over 2"):
        LocalWorld(2).run(lambda t: sum_replicated_gradients(model, t))


@pytest.mark.parametrize(
    "frozen", [("", "a.router.weight"), ("b.experts.down", ""), ("a.experts.down", "b.experts.down")]
)
def test_ranks_that_train_other_parameters_are_told_apart(frozen: tuple[str, str], ranks_of_two: Ranks) -> None:
    """Before gloo gets more bytes than it expects, which ends the process, or as many of another parameter."""
    for rank, text in enumerate(ranks_of_two.run(with_frozen, frozen)):
        found = rf"rank {rank}: sums of gradients: rank {1 - rank} trains \d+ parameters, expected the same \d+ as here"
        assert re.match(found, text), text


def with_frozen(group: EPGroup, frozen: tuple[str, str]) -> str:
    transport = make_transport(group)
    model = torch.nn.ModuleDict({name: build(DEEPSEEK, transport, REPLICAS["all on two ranks"]) for name in "ab"})
    if frozen[group.rank]:
        model.get_parameter(frozen[group.rank]).requires_grad_(False)
    with pytest.raises(PlanMismatch) as caught:
        sum_replicated_gradients(model, transport)
    return str(caught.value)
