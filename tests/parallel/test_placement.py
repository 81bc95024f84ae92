"""Slots, replicas and padding of a placement; topology."""

import pytest
import torch

from crossdock.errors import ConfigError, RankFailure
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


def test_what_is_left_keeps_every_slot() -> None:
    placement = ExpertPlacement(4, 3, (0, 1, 2, 3, 2, 3, 0, 1, 1, 0, 3, -1))
    left = placement.without([1])
    assert (left.world_size, left.num_slots, left.slots_per_rank) == (2, 8, 4)
    assert [left.experts_of_rank(rank) for rank in range(2)] == [placement.experts_of_rank(rank) for rank in (0, 2)]
    assert left.slot_ids(torch.tensor([[0, 3], [0, 3]])).tolist() == [[0, 3], [5, 6]]
    assert placement.without([]) == placement
    assert placement.without([0, 2]).physical_to_logical == (2, 3, 0, 1)


def test_what_is_left_may_hold_an_expert_twice() -> None:
    """Four replicas on three ranks; two of them go with rank 1, and the two of rank 0 are what there is."""
    left = ExpertPlacement(2, 3, (0, 0, 1, 0, 0, 1, 1, 1, 1)).without([1])
    assert left.physical_to_logical == (0, 0, 1, 1, 1, 1)
    with pytest.raises(ConfigError, match="rank 0 holds expert 0 twice"):
        ExpertPlacement(2, 2, (0, 0, 1, 1, 1, 1))


def test_experts_that_are_lost_are_listed() -> None:
    placement = ExpertPlacement(4, 2, (0, 1, 2, 0, 3, -1))
    with pytest.raises(RankFailure, match=r"experts \[1, 2\] are lost: no rank but \[0\], which are gone, held them"):
        placement.without([0])
    for lost in ([0, 1], [2], [-1]):
        with pytest.raises(ConfigError, match=r"some of the ranks 0..1 must stay, found"):
            placement.without(lost)
