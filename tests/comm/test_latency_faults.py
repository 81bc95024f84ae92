"""The low-latency mode where something is wrong: too much, disagreement, a rank that does not come, wrong calls."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.comm import Dispatcher, LocalTransport
from crossdock.comm.latency import LatencyDispatcher
from crossdock.comm.latency_bounds import Fingerprint, earliest, phase_of
from crossdock.comm.latency_tracks import TrackForm, Trouble
from crossdock.comm.one_sided_wait import MISSING, TOO_MANY, Awaited
from crossdock.errors import CapacityOverflow, ConfigError, CrossdockError
from crossdock.parallel import EPGroup
from crossdock.parallel.standing import Turn
from tests.comm.cases import Case, inputs, oracle
from tests.comm.one_after_another import errors_of
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
    """Rank 1 has another option."""
    transport = join(group)
    mine, case = transport.rank == 1, Case("even", (2, 2))
    options: dict[str, Any] = {"max_tokens": 8 if mine and what == "max_tokens" else 16}
    if mine and what == "on_overflow":
        options["on_overflow"] = "grow"
    if mine and what == "hidden":
        case = replace(case, hidden=12)
    if mine and what == "mode":
        Dispatcher(transport, 6, 33, torch.float32).plan(torch.zeros(2, 4, dtype=torch.int64))
    exchange(transport, case, dispatcher_of(transport, case, **options))


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("max_tokens", "max_tokens is 8 on rank 1, expected 16 as here"),
        ("hidden", "hidden size is 12 on rank 1, expected 33 as here"),
        ("on_overflow", "on_overflow is grow on rank 1, expected raise as here"),
        ("mode", "mode is throughput on rank 1, expected latency as here"),
    ],
)
def test_ranks_that_disagree_are_named(ranks_of_two: Ranks, what: str, names: str) -> None:
    with pytest.raises(RankError) as caught:
        ranks_of_two.run(disagreeing, what)
    assert caught.value.kinds == {0: "PlanMismatch", 1: "PlanMismatch"}
    assert f"rank 0: plan of latency exchange 1 in MoE layer 0: {names}" in str(caught.value)


def ahead(group: EPGroup) -> None:
    """Rank 1 is one exchange ahead."""
    transport, case = join(group), Case("even", (2, 2, 2))
    dispatcher = dispatcher_of(transport, case)
    exchange(transport, case, dispatcher)
    if transport.rank == 1:
        dispatcher.plan(torch.zeros(2, case.top_k, dtype=torch.int64))
    time.sleep(0.5 * (transport.rank == 0))  # so that another finds out first
    exchange(transport, case, dispatcher)


def as_on_a_gpu(dispatcher: LatencyDispatcher, polls_per_s: float) -> None:
    """Has its waits left to the device, whose kernels the interpreter plays, and what they find read later."""
    tracks = dispatcher._made()
    tracks.polls_per_s = polls_per_s
    for box in (box for track in tracks.all for box in (track.out, track.back)):
        box.kind, tracks._posted[box] = "cuda", torch.zeros_like(box.status)


@torch.no_grad()
def found_late(group: EPGroup, polls_per_s: float, **bounds: int) -> None:
    """Two layers that share buffers. Something is amiss in the first one's dispatch; the second one's notices."""
    transport, large = join(group), Case("one", (2, 6, 2), kind="one slot")
    layers = [dispatcher_of(transport, large, **bounds) for _ in range(2)]
    x_TD, ids_TK, _ = inputs(large)[transport.rank]
    plans = [layer.plan(ids_TK) for layer in layers]
    for layer in layers:
        as_on_a_gpu(layer, polls_per_s)
    if not bounds and transport.rank == 1:
        time.sleep(4.0)
    layers[0].dispatch(x_TD, plans[0])
    try:
        layers[1].dispatch(x_TD, plans[1])
    except CrossdockError as error:
        again = [lambda: layers[1].dispatch(x_TD, plans[1]), lambda: transport.all_gather([0], "again")]
        for use in again:
            with pytest.raises(type(error)):
                use()
        raise


@pytest.fixture(scope="module")
def said() -> list[list[str]]:
    """What each of three ranks raised: rank 1 ahead; with too many rows, and late, where a device waits."""
    too_many = partial(found_late, polls_per_s=1e4, capacity=9)
    with Ranks(3, timeout_s=2) as ranks:
        found: list[list[str]] = ranks.run(errors_of, [ahead, too_many, partial(found_late, polls_per_s=5.0)])
    return found


def test_a_rank_in_another_step_is_named_by_all(said: list[list[str]]) -> None:
    for rank, (text, *_) in enumerate(said):
        where = f"rank {rank}: dispatch of latency exchange {3 if rank == 1 else 2} in MoE layer 0"
        assert text.startswith(f"PlanMismatch: {where}: ")
        assert "exchange is 3 on rank 1, expected 2 as on rank 0" in text


def test_too_much_on_a_device_is_named_with_its_layer_and_final(said: list[list[str]]) -> None:
    for rank, (_, text, _) in enumerate(said):
        assert text.startswith(f"CapacityOverflow: rank {rank}: dispatch of latency exchange 1 in MoE layer 0: "), text
        assert "rank 1 has 24 rows for one rank, more than the capacity, 9: raise it, or set on_overflow=" in text


def test_who_is_late_for_a_device_is_named_with_the_layer_it_is_late_for(said: list[list[str]]) -> None:
    for rank, (_, _, text) in enumerate(said):
        assert text.startswith(f"CommTimeout: rank {rank}: dispatch of latency exchange 1 in MoE layer 0: "), text
        assert "rank 1 did not arrive within 2 s" in text


def test_of_several_troubles_the_first_exchange_counts() -> None:
    form = TrackForm(3, 10, 8, 64, 8)

    def words(exchange: int, layer: int) -> tuple[int, int]:
        return Fingerprint.of(layer, exchange, 12, 33, torch.float32, 4).words

    turns = tuple(Turn(n, phase_of("dispatch", 2, n), 0.0) for n in range(5))
    late, many = [MISSING, 0, 0, *words(2, 4)], [TOO_MANY, 11, 1, *words(2, 3)]
    later = Trouble(form, "combine", [[0] * 5, [MISSING, 0, 0, *words(2, 3)]], turns)
    found, awaited, turn = earliest([later, Trouble(form, "dispatch", [late, many], turns)])
    assert (found, turn) == ([[0] * 5, many], turns[3])
    assert awaited == Awaited(words(2, 3), 10, 16)


def failing_sends(group: EPGroup) -> None:
    """A dispatch that fails before anything has left can be tried again, by one rank alone, too."""
    transport, case = join(group), Case("even", (2,) * group.world_size)
    dispatcher = dispatcher_of(transport, case)
    x_TD, ids_TK, _ = inputs(case)[transport.rank]
    if transport.rank == 0:
        plan, send = dispatcher.plan(ids_TK), dispatcher._send
        dispatcher._send = None  # type: ignore[assignment, method-assign]
        for _ in range(3):
            with pytest.raises(TypeError, match="not callable"):
                dispatcher.dispatch_async(x_TD, plan)
        dispatcher._send = send  # type: ignore[method-assign]
    else:
        dispatcher.plan(ids_TK)
    check_rank(case, transport.rank, exchange(transport, case, dispatcher))


def check_rank(case: Case, rank: int, found: dict[str, Tensor]) -> None:
    want = oracle(case)[rank]
    assert all(torch.equal(found[key], want[key]) for key in ("rows_RD", "ends_L", "y_TD"))


def test_a_failed_send_leaves_the_buffers_free(ranks_of_two: Ranks) -> None:
    solo(failing_sends)
    ranks_of_two.run(failing_sends)


@pytest.mark.usefixtures("poison")
def test_rows_can_be_put_in_order_where_kernels_arranged_them() -> None:
    """By all of row_ids_R, of which only the beginning stands for rows."""
    transport, case = solo(join), Case("even", (5,))
    with torch.no_grad():
        for backend in ("torch", "triton"):
            dispatcher = dispatcher_of(transport, case, backend)  # type: ignore[arg-type]
            x_TD, ids_TK, _ = inputs(case)[0]
            inbound = dispatcher.dispatch(x_TD, dispatcher.plan(ids_TK))
            rows_RD = inbound.in_order().rows_RD
            assert torch.equal(rows_RD[: int(inbound.ends_L[-1])], oracle(case)[0]["rows_RD"])


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
    with pytest.raises(ConfigError, match="only the device knows"):
        plan.explain()
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
        with pytest.raises(ConfigError, match=r"combine of latency exchange 1 .*: its rows were combined before"):
            dispatcher.combine(results(inbound, transport.rank), weights_TK, inbound)
    flat = Dispatcher(LocalTransport(), 3, 33, torch.float32)
    other = flat.dispatch(x_TD, flat.plan(torch.zeros(2, 1, dtype=torch.int64)))
    with pytest.raises(ConfigError, match="found rows of another form"):
        dispatcher.combine(other.rows_RD, weights_TK, other)


def test_wrong_calls_are_named() -> None:
    solo(wrong_calls)
    with pytest.raises(ConfigError, match="the low-latency mode needs transport 'symmetric', found 'local'"):
        LatencyDispatcher(LocalTransport(), 4, 8, torch.float32)
    with pytest.raises(ConfigError, match=r"on_overflow must be one of .*, found 'drop'"):
        LatencyDispatcher(solo(join), 4, 8, torch.float32, on_overflow="drop")  # type: ignore[arg-type]
    for bounds in ({"max_tokens": 0}, {"capacity": -1}):
        with pytest.raises(ConfigError, match="max_tokens must be at least 1 and capacity at least 0"):
            LatencyDispatcher(solo(join), 4, 8, torch.float32, **bounds)


def test_fingerprints_come_back_as_they_were() -> None:
    one = Fingerprint.of(60, 123_456_789, 320, 7168, torch.bfloat16, 8)
    assert Fingerprint.read(one.words) == one
    assert all(word >= 1 << 62 for word in one.words)
