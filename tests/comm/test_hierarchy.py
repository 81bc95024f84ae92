"""The exchange over nodes: what crosses, in which order, and what it says about mistakes; bits: test_conformance."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock import LocalWorld
from crossdock.comm import Dispatcher, HierarchicalDispatcher, LocalTransport, Pending, Transport, make_dispatcher
from crossdock.comm.legs import Returning
from crossdock.comm.places import Choices, Places
from crossdock.errors import ConfigError, PlanMismatch, RankFailure
from crossdock.parallel import Topology

TWO_BY_TWO = Topology((0, 0, 1, 1))


def ids_of(rank: int, tokens: int = 6, slots: int = 8, top_k: int = 3) -> Tensor:
    return torch.randint(0, slots, (tokens, top_k), generator=torch.Generator().manual_seed(rank))


class Watched:
    """A transport that notes what is sent, in order: (phase, rows)."""

    def __init__(self, inner: Transport, seen: list[tuple[str, int]]) -> None:
        self.inner, self.seen = inner, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def split(self, parts: Any) -> "Watched":
        self.seen.append((f"split {[list(part) for part in parts]}", 0))
        return Watched(self.inner.split(parts), self.seen)

    def all_to_all_rows(self, rows_SD: Tensor, sends: list[int], receives: list[int], phase: str) -> Pending[Tensor]:
        self.seen.append((phase.split(" of exchange")[0], len(rows_SD)))
        return self.inner.all_to_all_rows(rows_SD, sends, receives, phase)


def one_exchange(transport: Transport, plus: bool = False) -> Tensor:
    exchange = HierarchicalDispatcher(transport, 8, 5, torch.float32)
    ids_TK = ids_of(transport.rank)
    x_TD = torch.randn(6, 5, generator=torch.Generator().manual_seed(transport.rank))
    inbound = exchange.dispatch(x_TD, exchange.plan(ids_TK, torch.ones(6, 3)))
    return exchange.combine(inbound.rows_RD, torch.ones(6, 3), inbound, x_TD if plus else None)


def test_far_rows_leave_first_and_a_token_crosses_to_a_node_once() -> None:
    def run(transport: Transport) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []
        one_exchange(Watched(transport, seen))  # type: ignore[arg-type]
        return seen

    for rank, seen in enumerate(LocalWorld(4, topology=TWO_BY_TWO).run(run)):
        assert [phase for phase, _ in seen[:2]] == ["split [[0, 2], [1, 3]]", "split [[0, 1], [2, 3]]"]
        seen = seen[2:]
        assert [phase for phase, _ in seen] == [
            "plan between nodes",
            "dispatch between nodes",
            "dispatch inside the node",  # of this node's own tokens
            "dispatch inside the node",
            "combine inside the node",
            "combine inside the node",
            "combine between nodes",
        ]
        crossing = [
            sum(len({slot // 4 for slot in slots} - {r // 2}) for slots in ids_of(r).tolist()) for r in range(4)
        ]
        assert seen[1][1] == crossing[rank] and seen[-1][1] == crossing[(rank + 2) % 4]


@pytest.mark.parametrize(("slots", "expected"), [(8, [25, 13, 12, 50]), (1, [25, 10, 15, 50]), (3, [25, 9, 16, 50])])
def test_near_rows_are_divided_between_experts_where_that_is_near(slots: int, expected: list[int]) -> None:
    """A hundred: of eight slots' ends 38 is near 35; of three slots' ends 34 is near 35, but not near 25 or 50."""
    near_T = torch.arange(100) * slots // 100

    def run(transport: Transport) -> list[int]:
        exchange = HierarchicalDispatcher(transport, 2 * slots, 5, torch.float32)
        ids_TK = torch.stack([near_T, near_T + slots], 1).roll(transport.rank, 1)
        arriving = exchange.dispatch_async(torch.ones(100, 5), exchange.plan(ids_TK))
        first, second, _, *others = [pending.wait() for pending in arriving.portions(5)]
        return [portion.rows for portion in (first, second, *others)]

    for found in LocalWorld(2, topology=Topology((0, 1))).run(run):
        assert sum(found) == 100 and found == expected


@pytest.mark.parametrize(("nodes", "width"), [(2, 2), (4, 4), (100, 4)])
def test_plans_are_as_wide_as_the_choices_of_a_token_however_many_nodes(nodes: int, width: int) -> None:
    choices = Choices(ids_of(0, slots=nodes).numpy(), Places(Topology(tuple(range(nodes))), 1, 1))
    assert choices.stops_TJ.shape == choices.nodes_TJ.shape == (6, width)
    for ids, there in zip(choices.slot_ids_TK.tolist(), choices.nodes_TJ.tolist(), strict=True):
        assert [node for node in there if node >= 0] == sorted({1, *ids})


def test_a_rank_that_plans_without_weights_is_named() -> None:
    def run(transport: Transport) -> None:
        exchange = HierarchicalDispatcher(transport, 8, 5, torch.float32)
        exchange.plan(ids_of(transport.rank), None if transport.rank == 2 else torch.ones(6, 3))

    with pytest.raises(PlanMismatch, match="plans with weights is 0 on rank 2, expected 1 as here"):
        LocalWorld(4, topology=TWO_BY_TWO).run(run)


def test_all_layers_share_the_parts_of_a_transport() -> None:
    def run(transport: Transport) -> int:
        seen: list[tuple[str, int]] = []
        watched = Watched(transport, seen)
        layers = [HierarchicalDispatcher(watched, 8, 5, torch.float32) for _ in range(3)]  # type: ignore[arg-type]
        for layer in layers:
            layer.plan(ids_of(transport.rank))
        return sum(phase.startswith("split") for phase, _ in seen)

    assert LocalWorld(4, topology=TWO_BY_TWO).run(run) == [2] * 4


def test_what_is_added_is_added_once() -> None:
    world = LocalWorld(4, topology=TWO_BY_TWO)
    with_it, without = (world.run(lambda t, plus=plus: one_exchange(t, plus)) for plus in (True, False))
    for rank, (added_TD, y_TD) in enumerate(zip(with_it, without, strict=True)):
        assert torch.equal(added_TD, y_TD + torch.randn(6, 5, generator=torch.Generator().manual_seed(rank)))


def test_a_plan_made_without_gradients_serves_with_them() -> None:
    """Weights that came with the plan are combine's own where these need gradients, each time."""

    def run(transport: Transport, ahead: bool) -> list[Tensor]:
        exchange = HierarchicalDispatcher(transport, 8, 5, torch.float32)
        weights_TK = torch.rand(6, 3, generator=torch.Generator().manual_seed(transport.rank)).requires_grad_()
        with torch.no_grad():
            plan = exchange.plan(ids_of(transport.rank), weights_TK if ahead else None)
        found = []
        for _ in range(2):
            weights_TK.grad = None
            inbound = exchange.dispatch(torch.arange(30.0).view(6, 5), plan)
            exchange.combine(inbound.rows_RD, weights_TK, inbound).sum().backward()
            assert weights_TK.grad is not None
            found.append(weights_TK.grad)
        return found

    world = LocalWorld(4, topology=TWO_BY_TWO)
    for with_it, without in zip(
        *(world.run(lambda t, ahead=ahead: run(t, ahead)) for ahead in (True, False)), strict=True
    ):
        assert all(map(torch.equal, with_it, without)) and int((with_it[0] != 0).sum()) == 18


def test_legs_can_be_advanced_and_an_inbound_combined_twice() -> None:
    def run(transport: Transport) -> bool:
        exchange = HierarchicalDispatcher(transport, 8, 5, torch.float32)
        arriving = exchange.dispatch_async(torch.ones(6, 5), exchange.plan(ids_of(transport.rank), torch.ones(6, 3)))
        for _ in range(2):
            arriving.advance()
        inbound, sums = arriving.wait(), []
        for _ in range(2):
            returning = exchange.combine_async(inbound.rows_RD, torch.ones(6, 3), inbound)
            returning.advance()
            returning.advance()
            sums.append(returning.wait())
        return torch.equal(sums[0], sums[1]) and torch.equal(sums[0], torch.full((6, 5), 3.0))

    assert all(LocalWorld(4, topology=TWO_BY_TWO).run(run))


def test_forms_are_chosen_by_what_there_is() -> None:
    def form(transport: Transport) -> str:
        return type(make_dispatcher(transport, 8, 5, torch.float32, hierarchy="node")).__name__

    assert LocalWorld(4, topology=TWO_BY_TWO).run(form) == ["HierarchicalDispatcher"] * 4
    assert LocalWorld(4).run(form) == ["Dispatcher"] * 4
    assert isinstance(make_dispatcher(LocalTransport(), 8, 5, torch.float32, mode="latency"), Dispatcher)
    with pytest.raises(ConfigError, match=r"hierarchy must be one of .*, found 'tree'"):
        make_dispatcher(LocalTransport(), 8, 5, torch.float32, hierarchy="tree")  # type: ignore[arg-type]


def test_nodes_of_unequal_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="equally many ranks on each, found 2, 1: use 'flat'"):
        LocalWorld(3, topology=Topology((0, 0, 1))).run(lambda t: HierarchicalDispatcher(t, 6, 5, torch.float32))


@pytest.mark.parametrize("flat", [0, 1])
def test_ranks_of_different_forms_are_named(flat: int) -> None:
    def run(transport: Transport) -> None:
        if transport.rank == flat:
            Dispatcher(transport, 8, 5, torch.float32).plan(ids_of(0))
        else:
            one_exchange(transport)

    found, expected = ("flat", "node") if flat else ("node", "flat")
    with pytest.raises(PlanMismatch, match=f"rank 0: .*: hierarchy is {found} on rank 1, expected {expected} as here"):
        LocalWorld(2, topology=Topology((0, 1))).run(run)


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"slots": 12}, "slots is 12 on rank 3, expected 8"),
        ({"hidden": 9}, "hidden size is 9 on rank 3, expected 5"),
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16 on rank 3, expected torch.float32"),
    ],
)
def test_ranks_that_disagree_are_named_before_anything_starts(other: dict[str, Any], names: str) -> None:
    def run(transport: Transport) -> None:
        options = {"slots": 8, "hidden": 5, "dtype": torch.float32} | (other if transport.rank == 3 else {})
        HierarchicalDispatcher(transport, options["slots"], options["hidden"], options["dtype"])

    with pytest.raises(PlanMismatch, match=f"rank 0: start of MoE layer 0: {names} as here"):
        LocalWorld(4, topology=TWO_BY_TWO).run(run)


def test_ranks_in_different_steps_are_named() -> None:
    def run(transport: Transport) -> None:
        exchange = HierarchicalDispatcher(transport, 8, 5, torch.float32)
        exchange.step = 4 if transport.rank == 2 else 1
        exchange.plan(ids_of(transport.rank))

    with pytest.raises(PlanMismatch, match="rank 0: plan of exchange 2 in MoE layer 0: exchange is 5 on rank 2"):
        LocalWorld(4, topology=TWO_BY_TWO).run(run)


@pytest.mark.parametrize("phase", ["plan", "dispatch", "combine"])
def test_a_rank_that_leaves_is_called_by_its_number_in_the_world(phase: str) -> None:
    def run(transport: Transport) -> str:
        exchange = HierarchicalDispatcher(transport, 8, 5, torch.float32)
        leaves = transport.rank == 3
        try:
            if leaves and phase == "plan":
                return ""
            plan = exchange.plan(ids_of(transport.rank))
            if leaves and phase == "dispatch":
                return ""
            inbound = exchange.dispatch(torch.ones(6, 5), plan)
            if leaves and phase == "combine":
                return ""
            exchange.combine(inbound.rows_RD, torch.ones(6, 3), inbound)
        except RankFailure as error:
            return str(error)
        return "went on"

    said = LocalWorld(4, topology=TWO_BY_TWO, timeout_s=20).run(run)
    assert said[3] == ""
    for rank in (0, 1, 2):
        assert said[rank].startswith(f"rank {rank}: ") and "rank 3 is gone" in said[rank], said[rank]


def test_wrong_arguments_are_named() -> None:
    def run(transport: Transport) -> None:
        exchange = HierarchicalDispatcher(transport, 8, 5, torch.float32)
        plan = exchange.plan(ids_of(0))
        inbound = exchange.dispatch(torch.ones(6, 5), plan)
        rows_RD, ones = inbound.rows_RD, torch.ones(6, 3)
        with pytest.raises(ConfigError, match=r"x_TD must be torch.float32 \[6, 5\], found torch.float32 \[6, 4\]"):
            exchange.dispatch(torch.ones(6, 4), plan)
        with pytest.raises(ConfigError, match=rf"out_RD must be torch.float32 \[{len(rows_RD)}, 5\], found"):
            exchange.combine(rows_RD[1:], ones, inbound)
        with pytest.raises(ConfigError, match=r"weights_TK must have shape \(6, 3\), found \(6, 2\)"):
            exchange.combine(rows_RD, ones[:, :2], inbound)
        with pytest.raises(ConfigError, match=r"slot_ids must be in -1..7, found 8"):
            exchange.plan(torch.full((1, 3), 8))
        with pytest.raises(ConfigError, match=r"weights_TK must have shape \(6, 3\), found \(5, 3\)"):
            exchange.plan(ids_of(0), ones[1:])
        with pytest.raises(ConfigError, match=r"weights_TK must be of a floating dtype, found torch.int64"):
            exchange.plan(ids_of(0), ones.long())
        with pytest.raises(ConfigError, match=r"weights_TK is on meta, but slot_ids is on cpu"):
            exchange.plan(ids_of(0), ones.to("meta"))
        with pytest.raises(ConfigError, match="weights_TK must be a tensor, found bool"):
            exchange.plan(ids_of(0), True)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="weights must be given for each of the 2 parts, found 1"):
            exchange.plans([ids_of(0)] * 2, [ones])
        with pytest.raises(ConfigError, match="slot_ids of exchanges planned together must have one K, found 3, 2"):
            exchange.plans([ids_of(0), ids_of(0)[:, :2]])
        with pytest.raises(ConfigError, match="plus_TD is on meta, but out_RD is on cpu"):
            exchange.combine(rows_RD, ones, inbound, torch.ones(6, 5, device="meta"))
        known = exchange.plan(ids_of(0), torch.full((6, 3), float("nan")))
        with pytest.raises(ConfigError, match="weights_TK of combine must be those of the plan"):
            exchange.combine(rows_RD, ones, exchange.dispatch(torch.ones(6, 5), known))
        exchange.combine(rows_RD, torch.full((6, 3), float("nan")), exchange.dispatch(torch.ones(6, 5), known))
        arriving = exchange.dispatch_async(torch.ones(6, 5), plan)
        near = arriving.portions(2)[0].wait()
        returning = Returning(exchange, plan, ones, None)
        with pytest.raises(ConfigError, match=rf"out_RD must be torch.float32 \[{len(near.rows_RD)}, 5\], found"):
            returning.start(rows_RD, near)
        flat = Dispatcher(LocalTransport(), 8, 5, torch.float32)
        other = flat.dispatch(torch.ones(6, 5), flat.plan(ids_of(0)))
        with pytest.raises(ConfigError, match="found rows of another form"):
            exchange.combine(rows_RD, ones, other)
        with pytest.raises(ConfigError, match="found rows of another form"):
            flat.combine(other.rows_RD, ones, inbound)

    LocalWorld(2, topology=Topology((0, 1))).run(run)
