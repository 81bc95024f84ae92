"""The low-latency mode where something is wrong: too much, disagreement, a rank that does not come, wrong calls."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.comm import Dispatcher, LocalTransport
from crossdock.comm.latency import LatencyDispatcher
from crossdock.comm.latency_bounds import Fingerprint
from crossdock.errors import CapacityOverflow, ConfigError
from crossdock.parallel import EPGroup
from tests.comm.cases import Case, inputs
from tests.comm.test_latency import check, dispatcher_of, exchange, join, results
from tests.launch import RankError, Ranks, solo


def overflowing(group: EPGroup, device: str, **bounds: int) -> tuple[str, dict[str, Tensor]]:
    """What is raised where rank 1 has too much, and that the next, smaller step is as if nothing had been."""
    transport, large, small = join(group, device), Case("one", (2, 6), kind="one slot"), Case("few", (1, 1))
    dispatcher = dispatcher_of(transport, large, **bounds)
    with pytest.raises(CapacityOverflow) as caught:
        exchange(transport, large, dispatcher)
    return str(caught.value), exchange(transport, small, dispatcher)


@pytest.mark.parametrize(
    ("bounds", "names"),
    [
        ({"capacity": 9}, "rank 1 has 24 rows for one rank, more than the capacity, 9: raise it"),
        ({"max_tokens": 5}, "rank 1 has 6 tokens, more than max_tokens, 5: raise it"),
    ],
)
def test_too_much_is_named_on_every_rank(ranks_of_two: Ranks, bounds: dict[str, int], names: str) -> None:
    found = ranks_of_two.run(overflowing_bounds, bounds)
    for rank, (text, _) in enumerate(found):
        assert f"rank {rank}: dispatch of latency exchange 1 in MoE layer 0: {names}" in text
    check(Case("few", (1, 1)), [result for _, result in found])


def overflowing_bounds(group: EPGroup, bounds: dict[str, int]) -> tuple[str, dict[str, Tensor]]:
    return overflowing(group, "cpu", **bounds)


def disagreeing(group: EPGroup, what: str) -> None:
    """Rank 1 is one exchange ahead, or has another option."""
    transport = join(group)
    mine, case = transport.rank == 1, Case("even", (2, 2))
    options: dict[str, Any] = {"max_tokens": 8 if mine and what == "max_tokens" else 16}
    if mine and what == "hidden":
        case = replace(case, hidden=12)
    dispatcher = dispatcher_of(transport, case, **options)
    exchange(transport, case, dispatcher)
    if mine and what == "step":
        dispatcher.plan(torch.zeros(2, case.top_k, dtype=torch.int64))
    exchange(transport, case, dispatcher)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("step", "dispatch of latency exchange 2 in MoE layer 0: exchange is 3 on rank 1, expected 2 as here"),
        ("max_tokens", "plan of latency exchange 1 in MoE layer 0: max_tokens is 8 on rank 1, expected 16 as here"),
        ("hidden", "plan of latency exchange 1 in MoE layer 0: hidden size is 12 on rank 1, expected 33 as here"),
    ],
)
def test_ranks_that_disagree_are_named(ranks_of_two: Ranks, what: str, names: str) -> None:
    with pytest.raises(RankError) as caught:
        ranks_of_two.run(disagreeing, what)
    assert caught.value.kinds == {0: "PlanMismatch", 1: "PlanMismatch"}
    assert f"rank 0: {names}" in str(caught.value)


def absent(group: EPGroup) -> None:
    """Rank 1 dispatches and does not combine."""
    transport, case = join(group), Case("even", (2, 2))
    dispatcher = dispatcher_of(transport, case)
    if transport.rank == 0:
        exchange(transport, case, dispatcher)
    with torch.no_grad():
        x_TD, ids_TK, _ = inputs(case)[transport.rank]
        dispatcher.dispatch(x_TD, dispatcher.plan(ids_TK))
    time.sleep(9.0)


def test_a_rank_that_does_not_combine_is_named() -> None:
    with Ranks(2, timeout_s=5) as ranks, pytest.raises(RankError) as caught:
        ranks.run(absent)
    assert caught.value.kinds[0] == "CommTimeout"
    assert "rank 0: combine of latency exchange 1 in MoE layer 0: rank 1 did not arrive within 5 s" in str(caught.value)


def wrong_calls(group: EPGroup) -> None:
    transport, case = join(group), Case("even", (2,) * group.world_size)
    dispatcher = dispatcher_of(transport, case)
    x_TD, ids_TK, weights_TK = inputs(case)[transport.rank]
    plan = dispatcher.plan(ids_TK)
    with pytest.raises(ConfigError, match="no gradients: use mode 'throughput'"):
        dispatcher.dispatch(x_TD.clone().requires_grad_(), plan)
    with pytest.raises(ConfigError, match=r"x_TD must be torch.float32 \[2, 33\], found torch.float32 \[2, 32\]"):
        dispatcher.dispatch(x_TD[:, :32], plan)
    with pytest.raises(ConfigError, match="MoE layer 0: experts per token is 3, expected 4 as before"):
        dispatcher.plan(ids_TK[:, :3])
    with pytest.raises(ConfigError, match="slot_ids must be in -1"):
        dispatcher.plan(torch.full_like(ids_TK, 99))
    waiting = [dispatcher.dispatch_async(x_TD, plan) for _ in range(2)]
    with pytest.raises(ConfigError, match="2 dispatches of latency mode are under way: wait for a combine first"):
        dispatcher.dispatch_async(x_TD, plan)
    for inbound in [pending.wait() for pending in waiting]:
        with pytest.raises(ConfigError, match=r"weights_TK must have shape \(2, 4\), found \(1, 4\)"):
            dispatcher.combine(results(inbound, transport.rank), weights_TK[:1], inbound)
        dispatcher.combine(results(inbound, transport.rank), weights_TK, inbound)
    flat = Dispatcher(LocalTransport(), 3, 33, torch.float32)
    other = flat.dispatch(x_TD, flat.plan(torch.zeros(2, 1, dtype=torch.int64)))
    with pytest.raises(ConfigError, match="found rows of another form"):
        dispatcher.combine(other.rows_RD, weights_TK, other)


def test_wrong_calls_are_named() -> None:
    solo(wrong_calls)
    with pytest.raises(ConfigError, match="the low-latency mode needs transport 'symmetric', found 'local'"):
        LatencyDispatcher(LocalTransport(), 4, 8, torch.float32)
    for bounds in ({"max_tokens": 0}, {"capacity": -1}):
        with pytest.raises(ConfigError, match="max_tokens must be at least 1 and capacity at least 0"):
            LatencyDispatcher(solo(join), 4, 8, torch.float32, **bounds)


def test_fingerprints_come_back_as_they_were() -> None:
    one = Fingerprint.of(60, 123_456_789, 320, 7168, torch.bfloat16, 8)
    assert Fingerprint.read(one.words) == one
    assert all(word >= 1 << 62 for word in one.words)
