"""The plan made on the device and the weighted sum, as kernels, against their references and the host's plan."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.backend import Backend
from crossdock.comm import Dispatcher, LocalTransport
from crossdock.comm.combine_kernel import weighted_sum_ref, weighted_sum_triton
from crossdock.comm.plan import plan_outgoing
from crossdock.comm.plan_kernel import BLOCK, place_rows_ref, place_rows_triton
from crossdock.errors import ConfigError

CASES = [  # T, K, P
    (0, 2, 4),
    (1, 1, 1),
    (1, 8, 16),
    (5, 3, 7),
    (BLOCK // 4, 4, 5),  # exactly one step of choices
    (BLOCK // 4 + 1, 4, 5),
]


def choices(tokens: int, top_k: int, slots: int, device: torch.device, lowest: int = -1) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 31 + top_k)
    return torch.randint(lowest, slots, (tokens, top_k), generator=generator).to(device)


@pytest.mark.parametrize(("tokens", "top_k", "slots"), CASES)
@pytest.mark.usefixtures("poison")
def test_places_rows_as_the_reference(tokens: int, top_k: int, slots: int, device: torch.device) -> None:
    ids_TK = choices(tokens, top_k, slots, device)
    for found, expected in zip(place_rows_triton(ids_TK, slots), place_rows_ref(ids_TK, slots), strict=True):
        assert found.dtype == expected.dtype == torch.int32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("held", [[], [3], [0, 1], [-1]])
def test_empty_slots_one_slot_and_no_expert(held: list[int], device: torch.device) -> None:
    ids_TK = torch.tensor([held[i % len(held)] for i in range(12)] if held else [], dtype=torch.int64).view(-1, 2)
    for found, expected in zip(place_rows_triton(ids_TK.to(device), 5), place_rows_ref(ids_TK, 5), strict=True):
        assert torch.equal(found.cpu(), expected)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-1, 4), min_size=0, max_size=24).filter(lambda ids: len(ids) % 3 == 0))
def test_the_reference_agrees_with_the_plan_of_the_host(ids: list[int]) -> None:
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 3)
    order_N, token_N, position_TK, ends_P = place_rows_ref(ids_TK, 5)
    host = plan_outgoing(ids_TK, 5)
    sent = len(host.order_S)
    assert order_N[:sent].tolist() == host.order_S.tolist()
    assert token_N.tolist() == (order_N // 3).tolist()
    assert ends_P.diff(prepend=torch.zeros(1)).tolist() == host.counts_P
    assert torch.equal(position_TK == len(ids), host.position_TK == sent)
    assert position_TK[position_TK < len(ids)].tolist() == host.position_TK[host.position_TK < sent].tolist()


@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("size_D", [1, 37, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poison")
def test_sums_as_the_reference(dtype: torch.dtype, size_D: int, top_k: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    position_TK = place_rows_ref(choices(5, top_k, 6, device), 6)[2]
    rows_SD = torch.randn(5 * top_k, size_D, generator=generator).to(device, dtype)
    plus_TD = torch.randn(5, size_D, generator=generator).to(device, dtype)
    weights_TK = torch.rand(5, top_k, generator=generator).to(device)
    weights_TK[position_TK == 5 * top_k] = float("nan")  # a weight beside no expert says nothing
    for weights in (weights_TK, None):
        for plus in (plus_TD, None):
            found_TD = weighted_sum_triton(rows_SD, weights, position_TK, plus)
            expected_TD = weighted_sum_ref(rows_SD, weights, position_TK, plus)
            if dtype == torch.bfloat16 and device.type == "cpu":  # the interpreter cuts bfloat16 off
                torch.testing.assert_close(found_TD, expected_TD, rtol=2.0**-6, atol=2.0**-6)
            else:
                assert torch.equal(found_TD, expected_TD)


def test_sums_in_the_order_of_k_whatever_the_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    rows_SD, weights_TK = torch.randn(44, 9, generator=generator), torch.rand(11, 4, generator=generator)
    position_TK = torch.randperm(44, generator=generator).view(11, 4)
    whole_TD = weighted_sum_ref(rows_SD, weights_TK, position_TK, None)
    monkeypatch.setattr("crossdock.comm.combine_kernel.CACHED", 80)  # two tokens a portion
    assert torch.equal(weighted_sum_ref(rows_SD, weights_TK, position_TK, None), whole_TD)


@pytest.mark.parametrize("lowest", [0, -1])
def test_a_dispatcher_on_the_device_gives_the_bits_of_the_host(lowest: int, device: torch.device) -> None:
    ids_TK = choices(9, 2, 4, device, lowest)
    x_TD = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).to(device)
    weights_TK = torch.rand(9, 2, generator=torch.Generator().manual_seed(2)).to(device)
    found = []
    for backend in ("triton", "torch"):
        dispatcher = Dispatcher(LocalTransport(), 4, 5, torch.float32, backend=backend)
        with torch.no_grad():
            plan = dispatcher.plan(ids_TK)
            inbound = dispatcher.dispatch(x_TD, plan)
            rows_RD = inbound.rows_RD if inbound.row_ids_R is None else inbound.rows_RD[inbound.row_ids_R]
            used = int(inbound.ends_L[-1])
            found.append((rows_RD[:used], inbound.ends_L, dispatcher.combine(rows_RD * 2, weights_TK, inbound, x_TD)))
    assert plan.token_R is None
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_ids_that_are_no_slot_are_no_expert(device: torch.device) -> None:
    ids_TK = torch.tensor([[0, 5], [2, 4], [-9, 3]], device=device)
    found = place_rows_triton(ids_TK, 3)
    for one, expected in zip(found, place_rows_ref(ids_TK, 3), strict=True):
        assert torch.equal(one, expected)
    assert found[2].tolist() == [[0, 6], [1, 6], [6, 6]]
    with torch.no_grad(), pytest.raises(ConfigError, match=r"slot_ids must be in -1..2, found -9"):
        Dispatcher(LocalTransport(), 3, 5, torch.float32, backend="triton").plan(ids_TK, checked=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_of_what_is_added_alone(backend: Backend, device: torch.device) -> None:
    """The shared experts', where nothing else is trained."""
    dispatcher = Dispatcher(LocalTransport(), 4, 5, torch.float32, backend=backend)
    inbound = dispatcher.dispatch(torch.zeros(3, 5, device=device), dispatcher.plan(choices(3, 2, 4, device, 0)))
    plus_TD = torch.ones(3, 5, device=device, requires_grad=True)
    y_TD = dispatcher.combine(inbound.rows_RD, torch.rand(3, 2, device=device), inbound, plus_TD)
    y_TD.sum().backward()
    assert torch.equal(plus_TD.grad, torch.ones_like(plus_TD))


def test_a_plan_without_gradients_serves_none(device: torch.device) -> None:
    dispatcher = Dispatcher(LocalTransport(), 4, 5, torch.float32, backend="triton")
    x_TD = torch.zeros(3, 5, device=device, requires_grad=True)
    with torch.no_grad():
        plan = dispatcher.plan(choices(3, 2, 4, device, 0))
        inbound = dispatcher.dispatch(x_TD, plan)
    with pytest.raises(ConfigError, match="the plan was made without gradients"):
        dispatcher.dispatch(x_TD, plan)
    with pytest.raises(ConfigError, match="the plan was made without gradients"):
        dispatcher.combine(
            torch.zeros(6, 5, device=device, requires_grad=True), torch.rand(3, 2, device=device), inbound
        )
