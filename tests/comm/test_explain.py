"""What a plan says of its traffic, against a count of every (token, k) by plain loops."""

import pytest
import torch
from torch import Tensor

from crossdock import LocalWorld
from crossdock.comm import Dispatcher, LocalTransport, Traffic, Transport, make_dispatcher, summed
from crossdock.comm import once as once_module
from crossdock.errors import ConfigError
from crossdock.parallel import Topology

TOKENS, SLOTS, TOP_K, HIDDEN = 7, 12, 4, 10


def ids_of(rank: int) -> Tensor:
    ids_TK = torch.randint(-1, SLOTS, (TOKENS, TOP_K), generator=torch.Generator().manual_seed(rank))
    return ids_TK.sort(1, descending=True).values


def reach(nodes: tuple[int, ...], source: int, rank: int) -> int:
    return 0 if rank == source else 1 if nodes[rank] == nodes[source] else 2


def explained(transport: Transport, hierarchy: str) -> tuple[Traffic, Traffic]:
    exchange = make_dispatcher(transport, SLOTS, HIDDEN, torch.bfloat16, hierarchy=hierarchy)  # type: ignore[arg-type]
    traffic = exchange.plan(ids_of(transport.rank)).explain()
    return traffic, summed(traffic, transport)


@pytest.mark.parametrize("goes_once", [False, True])
@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 2, 3), (0, 0, 0, 0)])
@pytest.mark.parametrize("hierarchy", ["flat", "node"])
def test_rows_are_those_of_the_choices(
    hierarchy: str, nodes: tuple[int, ...], goes_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once_module, "WORTH_BYTES", -1 if goes_once else 1 << 40)
    found = LocalWorld(4, topology=Topology(nodes)).run(lambda transport: explained(transport, hierarchy))
    per_rank = SLOTS // 4
    there, back, crossing = [[0] * 3 for _ in range(4)], [[0] * 3 for _ in range(4)], [0] * 4
    for source in range(4):
        for slots in ids_of(source).tolist():
            for slot in (slot for slot in slots if slot >= 0):
                there[source][reach(nodes, source, slot // per_rank)] += 1
                back[slot // per_rank][reach(nodes, slot // per_rank, source)] += 1
            crossing[source] += len({nodes[slot // per_rank] for slot in slots if slot >= 0} - {nodes[source]})
    stay, total = stays_at_entry(nodes), sum(map(sum, there))
    for rank, (own, everyone) in enumerate(found):
        assert [list(hop.rows) for hop in own.before] == [there[rank], back[rank]]
        assert [hop.row_bytes for hop in own.before] == [2 * HIDDEN] * 2
        assert everyone == found[0][1]
        assert [sum(hop.rows) for hop in everyone.before] == [total] * 2
        if hierarchy == "node" and max(nodes):
            assert own.after[0].rows == (0, 0, crossing[rank])
            assert everyone.after[0].rows == everyone.after[3].rows == (0, 0, sum(crossing))
            assert everyone.after[2].rows == (stay, total - stay, 0)
        elif not goes_once:
            assert own.after == own.before
        else:
            wanted = [{slot // per_rank for slot in slots if slot >= 0} for slots in ids_of(rank).tolist()]
            rows = [sum(reach(nodes, rank, r) == n for ranks in wanted for r in ranks) for n in range(3)]
            assert list(own.after[0].rows) == rows


def stays_at_entry(nodes: tuple[int, ...]) -> int:
    """How many (token, k) are computed on the rank where their token enters the node, or is at home."""
    number = [nodes[:rank].count(node) for rank, node in enumerate(nodes)]
    choices = [(source, slot) for source in range(4) for slot in ids_of(source).flatten().tolist() if slot >= 0]
    return sum(number[slot // (SLOTS // 4)] == number[source] for source, slot in choices)


def test_the_table_can_be_read() -> None:
    text = str(LocalWorld(4, topology=Topology((0, 0, 1, 1))).run(lambda t: explained(t, "node"))[0][1])
    lines = text.splitlines()
    assert [line[:34].strip() for line in lines[1:]] == [
        "before: dispatch", "before: combine", "before, in all", "after: dispatch between nodes",
        "after: dispatch inside the node", "after: combine inside the node", "after: combine between nodes",
        "after, in all"]  # fmt: skip
    assert len({len(line) for line in lines}) == 1 and "to other nodes" in lines[0]


def test_a_plan_on_the_device_and_a_part_of_one() -> None:
    dispatcher = Dispatcher(LocalTransport(), SLOTS, HIDDEN, torch.float32, backend="triton")
    with torch.no_grad():
        plan = dispatcher.plan(ids_of(1))
    assert plan.token_R is not None
    count = int((ids_of(1) >= 0).sum())
    assert [hop.rows for hop in plan.explain().before] == [(count, 0, 0)] * 2

    def part(transport: Transport) -> None:
        exchange = make_dispatcher(transport, SLOTS, HIDDEN, torch.float32, hierarchy="node")
        with pytest.raises(ConfigError, match="this is a part of one"):
            exchange.plan(ids_of(0)).near.explain()

    LocalWorld(2, topology=Topology((0, 1))).run(part)
