"""The low-latency mode's buffers where they may grow: to what is needed, never less, and for all layers of a form."""

import pytest
import torch
from torch import Tensor

from crossdock.comm.latency_bounds import Bounds
from crossdock.comm.one_sided_wait import TOO_MANY
from crossdock.parallel import EPGroup
from tests.comm.cases import Case, inputs, oracle
from tests.comm.test_latency import GPU, check_cases, dispatcher_of, exchange, in_order, join, results
from tests.launch import Ranks

GROWTH = [Case("few", (1, 2)), Case("more", (3, 9), kind="one slot"), Case("most", (40, 7)), Case("few again", (2, 1))]


def growing(group: EPGroup, device: str) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Steps that outgrow the rows, then the tokens; then two dispatches under way that both outgrow their buffers."""
    transport = join(group, device)
    dispatcher = dispatcher_of(transport, GROWTH[0], max_tokens=9, capacity=2, on_overflow="grow")
    found = [exchange(transport, case, dispatcher) for case in GROWTH]
    bounds = [dispatcher.bounds.max_tokens, dispatcher.bounds.capacity]
    small = dispatcher_of(transport, GROWTH[0], max_tokens=9, capacity=1, on_overflow="grow")
    pair = [[tensor.to(transport.device) for tensor in inputs(case)[transport.rank]] for case in (GROWTH[0], GROWTH[1])]
    with torch.no_grad():
        arriving = [small.dispatch_async(x_TD, small.plan(ids_TK)) for x_TD, ids_TK, _ in pair]
        for pending, (_, _, weights_TK) in zip(arriving, pair, strict=True):
            inbound = pending.wait()
            rows_RD = in_order(inbound).clone()
            y_TD = small.combine(results(inbound, transport.rank), weights_TK, inbound)
            found.append({"rows_RD": rows_RD.cpu(), "ends_L": inbound.ends_L.cpu(), "y_TD": y_TD.cpu()})
    return found, bounds


def test_buffers_grow_where_asked(ranks_of_two: Ranks) -> None:
    found = ranks_of_two.run(growing, "cpu")
    assert [bounds for _, bounds in found] == [[64, 64]] * 2 or [bounds for _, bounds in found] == [[64, 128]] * 2
    check_cases([*GROWTH, GROWTH[0], GROWTH[1]], [results for results, _ in found])


def growing_together(group: EPGroup) -> list[list[str]]:
    """Two layers of one form: what gathers each of three exchanges took, the first of which outgrows the buffers."""
    transport = join(group)
    stack = [dispatcher_of(transport, GROWTH[0], max_tokens=9, capacity=2, on_overflow="grow") for _ in range(2)]
    real, gathers = transport.all_gather, []

    def all_gather(values: list[int], phase: str) -> list[list[int]]:
        gathers.append(phase)
        return real(values, phase)

    transport.all_gather = all_gather  # type: ignore[method-assign]
    for dispatcher in stack:
        dispatcher.plan(inputs(GROWTH[0])[transport.rank][1])
    told = []
    for dispatcher in (*stack, stack[0]):
        gathers.clear()
        found = exchange(transport, GROWTH[2], dispatcher)
        assert torch.equal(found["y_TD"], oracle(GROWTH[2])[transport.rank]["y_TD"])
        told.append(list(gathers))
    return told


def test_layers_of_one_form_grow_as_one(ranks_of_two: Ranks) -> None:
    """Else each layer of a deep model would overflow for itself."""
    for first, second, third in ranks_of_two.run(growing_together):
        assert first == ["dispatch of latency exchange 2 in MoE layer 0"] and second == third == []


@pytest.mark.parametrize(("capacity", "expected"), [(1, 1024), (0, 1024)])
def test_bounds_never_shrink(capacity: int, expected: int) -> None:
    """Two dispatches were under way with the first bounds: what the second one needs fits by the time it says so."""
    bounds = Bounds(9, capacity, 3, "grow")
    for rows in (1000, 100):
        bounds.grow([[0] * 5, [TOO_MANY, rows, 9, 0, 0]], top_k=4)
        assert (bounds.max_tokens, bounds.capacity) == (9, expected)
    bounds = Bounds(8, 0, 3, "grow")
    bounds.grow([[TOO_MANY, 30, 400, 0, 0]], top_k=4)
    assert (bounds.max_tokens, bounds.form(4, 1, 1).capacity) == (512, 512 * 3)


@pytest.mark.gpu
@GPU
def test_buffers_of_a_gpu_grow() -> None:
    with Ranks(2) as ranks:
        check_cases([*GROWTH, GROWTH[0], GROWTH[1]], [found for found, _ in ranks.run(growing, "cuda")])
