"""Disagreement, wrong arguments and lost ranks are told apart, named and never waited for beyond the timeout."""

import os
import re
import sys
import threading
import time
from typing import Literal

import pytest
import torch

from crossdock import EPGroup, LocalWorld, make_transport
from crossdock.comm import Dispatcher, LocalTransport, TorchTransport, Transport, make_dispatcher
from crossdock.comm.node_plan import NodePlan
from crossdock.comm.plan import DENSE, plan_once, plan_outgoing
from crossdock.errors import CommTimeout, ConfigError, PlanMismatch, RankFailure
from crossdock.parallel import Topology
from tests.launch import RankError, Ranks


def one_exchange(
    transport: Transport, slots: int = 12, hidden: int = 8, dtype: torch.dtype = torch.float32, k: int = 2
) -> None:
    dispatcher = Dispatcher(transport, slots, hidden, dtype)
    inbound = dispatcher.dispatch(
        torch.ones(3, hidden, dtype=dtype), dispatcher.plan(torch.zeros(3, k, dtype=torch.int64))
    )
    dispatcher.combine(inbound.rows_RD, torch.ones(3, k), inbound)


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"slots": 8}, "slots is 8 on rank 1, expected 12 as here"),
        ({"hidden": 9}, "hidden size is 9 on rank 1, expected 8"),
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16 on rank 1, expected torch.float32"),
        ({"k": 3}, "experts per token is 3 on rank 1, expected 2"),
    ],
)
def test_ranks_that_disagree_are_named_before_rows_move(other: dict[str, object], names: str) -> None:
    with pytest.raises(PlanMismatch, match=f"rank 0: plan of exchange 1 in MoE layer 0: {re.escape(names)}"):
        LocalWorld(2).run(lambda t: one_exchange(t, **(other if t.rank else {})))  # type: ignore[arg-type]


def test_a_rank_in_another_layer_is_named() -> None:
    def skip_a_layer(transport: Transport) -> None:
        layers = [Dispatcher(transport, 4, 8, torch.float32) for _ in range(2)]
        ids_TK = torch.zeros(1, 1, dtype=torch.int64)
        for layer in layers:
            layer.plan(ids_TK)
        layers[transport.rank].plan(ids_TK)

    with pytest.raises(PlanMismatch, match="layer is 1 on rank 1, expected 0"):
        LocalWorld(2).run(skip_a_layer)


def test_ranks_in_different_phases_are_named() -> None:
    def plan_or_send(transport: Transport) -> None:
        if transport.rank:
            transport.all_to_all_rows(torch.ones(2, 1), [1, 1], [1, 1], "combine").wait()
        else:
            transport.all_gather([1, 2], "plan")

    with pytest.raises(PlanMismatch, match="rank 0: plan: rank 1 is elsewhere: combine"):
        LocalWorld(2).run(plan_or_send)
    with pytest.raises(PlanMismatch, match="rank 0: phase 0: rank 1 is elsewhere: phase 1"):
        LocalWorld(2).run(lambda t: t.all_to_all_rows(torch.ones(2, 1), [1, 1], [1, 1], f"phase {t.rank}").wait())


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (torch.tensor([[0, 4]]), "in -1..3, found 4"),
        (torch.tensor([[-2, 0]]), "in -1..3, found -2"),
        (torch.tensor([0, 1]), r"int64 \[T, K\] with K at least 1, found torch.int64 \(2,\)"),
        (torch.tensor([[0.0]]), "found torch.float32"),
    ],
)
def test_wrong_ids_are_named(ids: torch.Tensor, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        Dispatcher(LocalTransport(), 4, 8, torch.float32).plan(ids)


def test_rows_of_another_form_are_refused() -> None:
    dispatcher = Dispatcher(LocalTransport(), 4, 8, torch.float32)
    plan = dispatcher.plan(torch.tensor([[0, 1]]))
    with pytest.raises(ConfigError, match=r"x_TD must be torch.float32 \[1, 8\], found torch.float32 \[1, 9\]"):
        dispatcher.dispatch(torch.zeros(1, 9), plan)
    with pytest.raises(ConfigError, match=r"out_RD must be torch.float32 \[2, 8\], found torch.bfloat16"):
        dispatcher.combine(torch.zeros(2, 8).bfloat16(), torch.ones(1, 2), dispatcher.dispatch(torch.zeros(1, 8), plan))
    with pytest.raises(ConfigError, match=r"weights_TK must have shape \(1, 2\), found \(2, 2\)"):
        dispatcher.combine(torch.zeros(2, 8), torch.ones(2, 2), dispatcher.dispatch(torch.zeros(1, 8), plan))
    inbound = dispatcher.dispatch(torch.zeros(1, 8), plan)
    for plus_TD in (torch.zeros(2, 8), torch.zeros(8), torch.zeros(1, 4), torch.zeros(1, 8).double()):
        with pytest.raises(ConfigError, match=r"plus_TD must be torch.float32 \[1, 8\], found"):
            dispatcher.combine(torch.zeros(2, 8), torch.ones(1, 2), inbound, plus_TD)
    with pytest.raises(ConfigError, match="weights_TK must be of a floating dtype"):
        dispatcher.combine(torch.zeros(2, 8), torch.ones(1, 2).long(), inbound)
    with pytest.raises(ConfigError, match="5 slots do not divide over 2 ranks"):
        LocalWorld(2).run(lambda t: Dispatcher(t, 5, 8, torch.float32))


def test_a_token_goes_to_a_rank_once_where_that_saves_much() -> None:
    def sent(transport: Transport, hidden: int) -> list[int]:
        dispatcher = Dispatcher(transport, 8, hidden, torch.float32)
        ids_TK = torch.arange(8).expand(60, 8).contiguous()
        plan = dispatcher.plan(ids_TK)
        assert plan.send_counts == [240, 240]
        return plan.send_counts if plan.once is None else plan.once.send_counts

    for hidden, expected in ((16, [240, 240]), (2048, [60, 60])):
        assert LocalWorld(2).run(lambda t, hidden=hidden: sent(t, hidden)) == [expected] * 2  # type: ignore[misc]


@pytest.mark.parametrize("ranks", [3, 200])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_which_tokens_each_rank_wants(ranks: int, tokens: int) -> None:
    """By marking (rank, token) pairs where ranks are few, and by sorting rows where they are many."""
    ids_TK = torch.randint(-1, 2 * ranks, (tokens, 4), generator=torch.Generator().manual_seed(ranks))
    outgoing = plan_outgoing(ids_TK, 2 * ranks)
    wanted = plan_once(outgoing, ranks)
    pairs = [(int(ids_TK.view(-1)[at]) // 2, int(at) // 4) for at in outgoing.order_S]  # (rank, token) of each row
    each = [sorted({token for rank, token in pairs if rank == one}) for one in range(ranks)]
    assert len(pairs) == int((ids_TK >= 0).sum())
    assert tokens < 50 or (ranks * tokens > DENSE * len(pairs)) == (ranks == 200)
    assert wanted.token_U.tolist() == [token for some in each for token in some]
    assert wanted.counts_W == [len(some) for some in each]
    assert wanted.index_S.tolist() == [each[rank].index(token) for rank, token in pairs]
    assert wanted.saved_W.tolist() == [sum(rank == one for rank, _ in pairs) - len(each[one]) for one in range(ranks)]


@pytest.mark.parametrize("hierarchy", ["flat", "node"])
@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 1), (0, 0, 1, 1)])
def test_exchanges_can_be_planned_together(nodes: tuple[int, ...], hierarchy: Literal["flat", "node"]) -> None:
    """With one exchange of each kind of integers for all of them, weights too, and nothing else changed.

    Of the three the first is large enough for tokens to travel once to a rank, the others are not.
    """

    def run(transport: Transport, together: bool) -> list[torch.Tensor]:
        exchange = make_dispatcher(transport, 8, 2048, torch.float32, hierarchy=hierarchy)
        x_TD = torch.randn(305, 2048, generator=torch.Generator().manual_seed(transport.rank))
        ids_TK = torch.randint(-1, 8, (305, 6), generator=torch.Generator().manual_seed(transport.rank))
        parts = [slice(0, 300), slice(300, 300), slice(300, 305)]
        ids = [ids_TK[part] for part in parts]
        weights_TK = torch.rand(305, 6, generator=torch.Generator().manual_seed(7 + transport.rank))
        weights = [weights_TK[part] for part in parts]
        plans = exchange.plans(ids, weights) if together else map(exchange.plan, ids)
        found = []
        for part, plan in zip(parts, plans, strict=True):
            for flat in (plan.near, plan.far) if isinstance(plan, NodePlan) else (plan,):
                assert len(flat.send_counts) == 1 or (flat.once is None) == (part.start > 0)
            inbound = exchange.dispatch(x_TD[part], plan)
            found += [inbound.rows_RD, exchange.combine(inbound.rows_RD, weights_TK[part], inbound)]
        return found

    world = LocalWorld(len(nodes), topology=Topology(nodes))
    for one, other in zip(*(world.run(lambda t, how=how: run(t, how)) for how in (True, False)), strict=True):  # type: ignore[misc]
        assert all(map(torch.equal, one, other))


def test_ranks_that_plan_other_numbers_together_are_named() -> None:
    def run(transport: Transport) -> None:
        ids_TK = torch.zeros(1, 1, dtype=torch.int64)
        Dispatcher(transport, 2, 4, torch.float32).plans([ids_TK] * (1 + transport.rank))

    with pytest.raises(PlanMismatch, match="planned together is 2 on rank 1, expected 1 as here"):
        LocalWorld(2).run(run)


def test_transports_are_chosen_by_name() -> None:
    assert make_transport(EPGroup.solo()).name == "local"
    with pytest.raises(ConfigError, match=r"transport must be 'auto' or one of .*, found 'rdma'"):
        make_transport(EPGroup.solo(), "rdma")
    with pytest.raises(ConfigError, match="needs a process group"):
        TorchTransport(EPGroup.solo())


def test_a_virtual_rank_that_raises_ends_the_others_at_once() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 2:
            raise ValueError("broken on purpose")
        one_exchange(transport)

    began = time.monotonic()
    with pytest.raises(ValueError, match="broken on purpose"):
        LocalWorld(3, timeout_s=30).run(work)
    assert time.monotonic() - began < 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_virtual_ranks_have_ended_when_their_error_is_raised() -> None:
    """A thread torch is still clearing up after would abort a process that exits at once."""

    def fail(transport: Transport) -> None:
        started.append(threading.get_native_id())
        raise ValueError("broken on purpose")

    for _ in range(100):
        started: list[int] = []
        with pytest.raises(ValueError, match="broken on purpose"):
            LocalWorld(8).run(fail)
        assert not {str(thread) for thread in started} & set(os.listdir("/proc/self/task"))


def test_a_virtual_rank_that_leaves_or_stalls_is_named() -> None:
    with pytest.raises(RankFailure, match="rank 0: plan of exchange 1 in MoE layer 0: rank 1 is gone: it has finished"):
        LocalWorld(2).run(lambda t: None if t.rank else one_exchange(t))

    def stall(transport: Transport) -> None:
        if transport.rank:
            time.sleep(2)
        else:
            one_exchange(transport)

    with pytest.raises(CommTimeout, match=r"rank 1 did not arrive within 0\.5 s"):
        LocalWorld(2, timeout_s=0.5).run(stall)


def exchange_or_stay_away(group: EPGroup, absent: int, seconds: float) -> float:
    """One exchange, then another in which `absent` comes `seconds` late or (below 0) dies; how long the error took."""
    transport = make_transport(group)
    one_exchange(transport)
    if group.rank == absent:
        if seconds < 0:
            os._exit(1)
        time.sleep(seconds)
        return 0.0
    began = time.monotonic()
    try:
        one_exchange(transport)
    except (RankFailure, CommTimeout) as error:
        took = time.monotonic() - began
        assert f"rank {absent}" in str(error).split(":", 1)[1], error
        assert took < 15
        raise
    return time.monotonic() - began


def test_a_process_that_dies_is_named_by_every_other() -> None:
    with Ranks(3, timeout_s=20) as ranks, pytest.raises(RankError) as caught:
        ranks.run(exchange_or_stay_away, 1, -1.0)
    assert caught.value.kinds == {0: "RankFailure", 1: "Died", 2: "RankFailure"}


def test_a_process_that_stalls_is_named_within_the_timeout() -> None:
    with Ranks(2, timeout_s=2) as ranks, pytest.raises(RankError) as caught:
        ranks.run(exchange_or_stay_away, 1, 5.0)
    assert caught.value.kinds in ({0: "RankFailure"}, {0: "CommTimeout"})


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1, 2, 3]]])
def test_parts_exchange_by_themselves(parts: list[list[int]], ranks_of_four: Ranks) -> None:
    for found in (LocalWorld(4).run(lambda transport: split_and_gather(transport, parts)),
                  ranks_of_four.run(split_over_gloo, parts)):  # fmt: skip
        for rank, (place, gathered, members) in enumerate(found):
            part = next(part for part in parts if rank in part)
            assert (place, gathered, members) == (part.index(rank), [[r] for r in part], tuple(part))


def split_and_gather(transport: Transport, parts: list[list[int]]) -> tuple[int, list[list[int]], tuple[int, ...]]:
    part = transport.split(parts)
    return part.rank, part.all_gather([transport.rank], "parts"), part.members


def split_over_gloo(group: EPGroup, parts: list[list[int]]) -> tuple[int, list[list[int]], tuple[int, ...]]:
    return split_and_gather(make_transport(group), parts)


def test_a_split_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"each of the ranks 0\.\.1 once, ascending, found \[\[0\], \[0, 1\]\]"):
        LocalWorld(2).run(lambda transport: transport.split([[0], [0, 1]]))
