"""The low-latency mode against the exchange's oracle: bits, growth, overlap, what is left in buffers, graphs."""

import os
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.backend import Backend
from crossdock.comm import Dispatcher, make_dispatcher
from crossdock.comm.latency import LatencyDispatcher, LatencyInbound
from crossdock.comm.symmetric import SymmetricTransport
from crossdock.moe import MoEConfig, MoELayer
from crossdock.moe.config import ExchangeConfig
from crossdock.moe.wire import Fp8Wire
from crossdock.parallel import EPGroup
from tests.comm.cases import Case, cases, expert, inputs, oracle
from tests.launch import Ranks, solo

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KEYS = ("rows_RD", "ends_L", "y_TD")


def join(group: EPGroup, device: str = "cpu") -> SymmetricTransport:
    if device == "cuda":
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        group = replace(group, device=torch.device("cuda", 0))
    return SymmetricTransport(group)


def dispatcher_of(
    transport: SymmetricTransport, case: Case, backend: Backend = "auto", **bounds: Any
) -> LatencyDispatcher:
    """Room for what `case` sends, whether a token's slots differ or not."""
    slots, tokens = case.world_size * case.slots_per_rank, max(16, *case.tokens)
    bounds = {"max_tokens": tokens, "capacity": tokens * case.top_k} | bounds
    return LatencyDispatcher(transport, slots, case.hidden, case.dtype, backend, **bounds)


def in_order(inbound: LatencyInbound) -> Tensor:
    """The received rows by slot, as many as there are."""
    used = int(inbound.ends_L[-1])
    return inbound.rows_RD[:used] if inbound.row_ids_R is None else inbound.rows_RD[inbound.row_ids_R[:used].long()]


def results(inbound: LatencyInbound, rank: int) -> Tensor:
    """What the experts of `cases.expert` give, as many rows as combine wants, NaN where no row is."""
    rows_RD, ends = in_order(inbound), inbound.ends_L.tolist()
    out_RD = rows_RD.new_full(
        (len(inbound.row_ids_R if inbound.row_ids_R is not None else rows_RD), rows_RD.shape[1]), float("nan")
    )
    for local, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        out_RD[start:end] = expert(rows_RD[start:end], rank * len(ends) + local)
    return out_RD


@torch.no_grad()
def exchange(transport: SymmetricTransport, case: Case, dispatcher: LatencyDispatcher) -> dict[str, Tensor]:
    x_TD, ids_TK, weights_TK = (tensor.to(transport.device) for tensor in inputs(case)[transport.rank])
    inbound = dispatcher.dispatch(x_TD, dispatcher.plan(ids_TK))
    rows_RD = in_order(inbound).clone()
    y_TD = dispatcher.combine(results(inbound, transport.rank), weights_TK, inbound)
    dispatcher.check()
    return {"rows_RD": rows_RD.cpu(), "ends_L": inbound.ends_L.cpu(), "y_TD": y_TD.cpu()}


def check(case: Case, by_rank: list[dict[str, Tensor]]) -> None:
    for rank, (have, want) in enumerate(zip(by_rank, oracle(case), strict=True)):
        for key in KEYS:
            where = f"{case.name}, rank {rank} of {case.world_size}, {key}"
            assert have[key].dtype == want[key].dtype and torch.equal(have[key], want[key]), where


def run_cases(group: EPGroup, todo: list[Case], backend: Backend, device: str = "cpu") -> list[dict[str, Tensor]]:
    transport = join(group, device)
    return [exchange(transport, case, dispatcher_of(transport, case, backend)) for case in todo]


def check_cases(todo: list[Case], by_rank: list[list[dict[str, Tensor]]]) -> None:
    for case, found in zip(todo, zip(*by_rank, strict=True), strict=True):
        check(case, list(found))


def test_every_case_to_the_bit_alone() -> None:
    check_cases(cases(1), [solo(run_cases, cases(1), "torch")])


def test_every_case_to_the_bit_two(ranks_of_two: Ranks) -> None:
    """The triton backend sums bfloat16 in the interpreter, which cuts it off: that case is the torch backend's."""
    check_cases(cases(2), ranks_of_two.run(run_cases, cases(2), "torch"))
    todo = [case for case in cases(2) if case.dtype != torch.bfloat16]
    check_cases(todo, ranks_of_two.run(run_cases, todo, "triton"))


def test_every_case_to_the_bit_four(ranks_of_four: Ranks) -> None:
    check_cases(cases(4), ranks_of_four.run(run_cases, cases(4), "torch"))


def shrinking(group: EPGroup, backend: Backend, device: str) -> list[dict[str, Tensor]]:
    """One dispatcher, token counts that fall and rise; the first step's rows are NaN, and so stay in the buffers."""
    transport = join(group, device)
    dispatcher = dispatcher_of(transport, STEPS[0], backend)
    x_TD, ids_TK, weights_TK = (tensor.to(transport.device) for tensor in inputs(STEPS[0])[transport.rank])
    with torch.no_grad():
        for _ in range(3):
            inbound = dispatcher.dispatch(torch.full_like(x_TD, float("nan")), dispatcher.plan(ids_TK))
            assert dispatcher.combine(results(inbound, transport.rank), weights_TK, inbound).isnan().all()
    return [exchange(transport, step, dispatcher) for step in STEPS]


STEPS = [Case(f"{tokens}", tokens) for tokens in ((16, 16), (3, 5), (0, 1), (0, 0), (7, 0), (16, 2))]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_left_of_longer_steps(ranks_of_two: Ranks, backend: Backend) -> None:
    check_cases(STEPS, ranks_of_two.run(shrinking, backend, "cpu"))


def two_batches(group: EPGroup, device: str) -> list[dict[str, Tensor]]:
    """Two dispatches under way at once, over and over, with the combine of one behind the dispatch of the other."""
    transport, found = join(group, device), []
    dispatcher = dispatcher_of(transport, PAIR[0])
    batches = [[tensor.to(transport.device) for tensor in inputs(case)[transport.rank]] for case in PAIR]
    with torch.no_grad():
        for turn in range(4):
            arriving = [dispatcher.dispatch_async(x_TD, dispatcher.plan(ids_TK)) for x_TD, ids_TK, _ in batches]
            time.sleep(0.01 * (turn % 2) * transport.rank)
            inbounds = [pending.wait() for pending in arriving]
            rows = [in_order(inbound).clone() for inbound in inbounds]
            outs = [results(inbound, transport.rank) for inbound in inbounds]
            returning = [dispatcher.combine_async(o, b[2], i) for o, b, i in zip(outs, batches, inbounds, strict=True)]
            y = [pending.wait() for pending in returning]
            for number, inbound in enumerate(inbounds):
                found.append({"rows_RD": rows[number].cpu(), "ends_L": inbound.ends_L.cpu(), "y_TD": y[number].cpu()})
        dispatcher.check()
    return found


PAIR = [Case("first of two", (5, 3)), Case("second of two", (2, 6), kind="holes")]


def test_two_batches_at_once(ranks_of_two: Ranks) -> None:
    check_cases(PAIR * 4, ranks_of_two.run(two_batches, "cpu"))


def repeats(group: EPGroup, device: str) -> list[bytes]:
    transport, case = join(group, device), Case("even", (5, 5))
    dispatcher = dispatcher_of(transport, case)
    found = [exchange(transport, case, dispatcher) for _ in range(20)]
    return [b"".join(one[key].numpy().tobytes() for key in KEYS) for one in found]


def test_twenty_times_the_same_bits(ranks_of_two: Ranks) -> None:
    for bits in ranks_of_two.run(repeats, "cpu"):
        assert len(set(bits)) == 1 and len(bits) == 20


CONFIG = MoEConfig(hidden_size=32, expert_size=24, num_experts=8, top_k=3, shared_size=16)


@torch.no_grad()
def layers(group: EPGroup) -> None:
    """Layers in latency mode beside some in throughput mode, two of each so that they share buffers, to the bit."""
    transport, found = join(group), []
    for exchange_config in (ExchangeConfig(), ExchangeConfig(mode="latency", max_tokens=8)):
        stack = [MoELayer(CONFIG, transport, exchange=exchange_config, dtype=torch.float32) for _ in range(2)]
        for seed, layer in enumerate(stack):
            generator = torch.Generator().manual_seed(seed)
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        x_TD = torch.randn(4 + transport.rank, 32, generator=torch.Generator().manual_seed(transport.rank))
        for layer in (*stack, *stack):
            x_TD = layer(x_TD)
        found.append(x_TD)
    assert torch.equal(*found) and found[0].abs().max() > 0
    assert len(transport._tracks) == 1


def test_layers_give_the_bits_of_the_other_mode(ranks_of_two: Ranks) -> None:
    ranks_of_two.run(layers)


@torch.no_grad()
def encoded(group: EPGroup) -> None:
    """Rows on an FP8 wire: what arrives is what the flat exchange decodes, and travels in as many bytes."""
    transport, case = join(group), Case("even", (4, 4), hidden=200)
    wire = Fp8Wire(200)
    x_TD, ids_TK, weights_TK = inputs(case)[transport.rank]
    flat = Dispatcher(transport, 6, 200, torch.float32, codec=wire)
    mine = LatencyDispatcher(transport, 6, 200, torch.float32, codec=wire, max_tokens=4, capacity=16)
    arrived = mine.dispatch(x_TD, mine.plan(ids_TK))
    expected = flat.dispatch(x_TD, flat.plan(ids_TK))
    rows_RD, expected_RD = (inbound.decoded().in_order().rows_RD for inbound in (arrived, expected))
    assert torch.equal(rows_RD, expected_RD) and torch.equal(arrived.ends_L, expected.ends_L)
    assert arrived.tracks.form.row_bytes == wire.row_bytes(200) < 2 * 200
    found_TD, expected_TD = mine.combine(rows_RD, weights_TK, arrived), flat.combine(rows_RD, weights_TK, expected)
    assert torch.equal(found_TD, expected_TD)


def test_rows_may_travel_encoded(ranks_of_two: Ranks) -> None:
    ranks_of_two.run(encoded)


def made(group: EPGroup) -> list[str]:
    transport = join(group)
    return [
        type(make_dispatcher(transport, 4, 8, torch.float32, mode=mode)).__name__ for mode in ("latency", "throughput")
    ]


def test_made_by_its_name(ranks_of_two: Ranks) -> None:
    assert ranks_of_two.run(made) == [["LatencyDispatcher", "Dispatcher"]] * 2


def replayed(group: EPGroup) -> None:
    """A step captured in a CUDA graph once, replayed with other inputs and routing."""
    transport, case = join(group, "cuda"), Case("even", (5,) * group.world_size)
    dispatcher = dispatcher_of(transport, case)
    x_TD, ids_TK, weights_TK = (tensor.cuda() for tensor in inputs(case)[transport.rank])
    scale_L1 = torch.tensor([2.0 ** ((transport.rank * 3 + local) % 5 - 2) for local in range(3)], device="cuda")

    def step() -> Tensor:
        inbound = dispatcher.dispatch(x_TD, dispatcher.plan(ids_TK))
        assert inbound.row_ids_R is not None
        at_R = torch.arange(len(inbound.row_ids_R), device="cuda")
        slot_R = torch.searchsorted(inbound.ends_L, at_R, right=True).clamp(max=2)
        ids_R = inbound.row_ids_R.long().clamp(0, len(inbound.rows_RD) - 1)
        return dispatcher.combine(inbound.rows_RD[ids_R] * scale_L1[slot_R, None], weights_TK, inbound)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        transport.all_gather([0], "capture")
        with torch.cuda.graph(graph):
            y_TD = step()
        for seed in range(5):
            other = replace(case, name=f"replay {seed}", kind="holes")
            for old, new in zip((x_TD, ids_TK, weights_TK), inputs(other)[transport.rank], strict=True):
                old.copy_(new)
            graph.replay()
            dispatcher.check()
            assert torch.equal(y_TD.cpu(), oracle(other)[transport.rank]["y_TD"])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_processes_on_one_gpu(world_size: int) -> None:
    with Ranks(world_size) as ranks:
        check_cases(cases(world_size), ranks.run(run_cases, cases(world_size), "auto", "cuda"))
        ranks.run(replayed)
        if world_size == 2:
            check_cases(STEPS, ranks.run(shrinking, "auto", "cuda"))
            check_cases(PAIR * 4, ranks.run(two_batches, "cuda"))
            assert all(len(set(bits)) == 1 for bits in ranks.run(repeats, "cuda"))
