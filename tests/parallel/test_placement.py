"""Slots, replicas and padding of a placement; topology."""

import pytest
import torch

from crossdock.errors import ConfigError
from crossdock.parallel import ExpertPlacement, Topology


def test_contiguous_is_the_identity() -> None:
    placement = ExpertPlacement.contiguous(8, 4)
    ids = torch.tensor([[0, 7], [-1, 3]])
    assert placement.slots_per_rank == 2 and placement.experts_of_rank(3) == (6, 7)
    assert torch.equal(placement.slot_ids(ids), ids)


def test_replicas_take_turns_by_token_and_padding_is_skipped() -> None:
    placement = ExpertPlacement(3, 2, (0, 1, 0, 2, -1, -1)[:4])
    ids = torch.tensor([[0, 1], [0, 2], [0, -1]])
    assert placement.slot_ids(ids).tolist() == [[0, 1], [2, 3], [0, -1]]
    assert placement.replica_count_E.tolist() == [2, 1, 1]
    padded = ExpertPlacement(3, 2, (2, -1, 1, 0))
    assert padded.slot_ids(torch.tensor([[0, 1, 2]])).tolist() == [[3, 2, 0]]
    assert padded.experts_of_rank(0) == (2, -1)


@pytest.mark.parametrize(
    ("experts", "world", "slots", "names"),
    [
        (2, 2, (0, 1, 0), "3 slots do not divide over 2 ranks"),
        (2, 2, (0, 0), "expert 1 has no slot|holds expert"),
        (2, 2, (0, 0, 1, 1), "rank 0 holds expert 0 twice"),
        (2, 1, (0, 2), "slot 1 holds expert 2"),
        (2, 0, (0, 1), "experts and ranks"),
    ],
)
def test_invalid_placements_are_named(experts: int, world: int, slots: tuple[int, ...], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        ExpertPlacement(experts, world, slots)


def test_more_replicas_than_ranks_may_double_up() -> None:
    assert ExpertPlacement(1, 2, (0, 0, 0, 0)).replica_count_E.tolist() == [4]


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 experts do not divide over 3 ranks"):
        ExpertPlacement.contiguous(16, 3)


def test_topology() -> None:
    topology = Topology.from_names(("x", "y", "x"))
    assert topology.node_of_rank == (0, 1, 0) and topology.num_nodes == 2
    assert topology.ranks_of_node(0) == (0, 2) and topology.same_node(0, 2) and not topology.same_node(0, 1)
    with pytest.raises(ConfigError, match="rank 0 is on node 1"):
        Topology((1, 0))
