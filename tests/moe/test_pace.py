"""The cost model: how many chunks, from what was gathered and measured."""

from dataclasses import replace

import pytest
import torch

from crossdock import LocalWorld
from crossdock.comm import LocalTransport, Transport
from crossdock.moe.pace import CPU, Pace, Rates, Work, amid_s, best_chunks, chunk_shares, predicted_s, products_s

WORK = Work(top_k=8, row_bytes=4096, back_bytes=4096, row_operations=6 * 2048 * 768, weight_bytes=96 * 2048 * 768)


def test_cost_model_weighs_traffic_against_what_chunks_cost() -> None:
    def choose(tokens: int = 4096, **slower: float) -> int:
        return best_chunks(CPU.scaled(slower.get("exchange", 1.0), slower.get("products", 1.0)), WORK, tokens, 4)

    assert choose(tokens=0) == choose(tokens=1) == 1, "nothing to hide"
    assert choose(exchange=1e-4) == 1, "traffic costs nothing, so hiding it saves nothing"
    assert choose(exchange=30.0) > choose(exchange=5.0) >= 3, "traffic and products are even, and a sixth"
    assert choose(exchange=5.0) > choose(exchange=5.0, tokens=8), "weights are read again for each chunk"


def test_cost_model_times_one_chunk_as_a_sum() -> None:
    rows = 4096 * 8
    link_s = CPU.exchange_s + CPU.byte_s * 4096 * rows * 3 / 4
    products_s = CPU.pass_s + CPU.weight_byte_s * WORK.weight_bytes + CPU.operation_s * WORK.row_operations * rows
    handled_s = 2 * (CPU.handling_s + CPU.handled_byte_s * 4096 * rows)
    assert predicted_s(CPU, WORK, [1.0], 4096, 4) == pytest.approx(2 * link_s + handled_s + products_s)


def test_cost_model_hides_all_but_the_ends() -> None:
    """With no cost of a chunk, and products as long as the traffic, a layer takes its products and the two ends."""
    rates = Rates(exchange_s=0.0, pass_s=0.0, weight_byte_s=0.0, byte_s=1e-9, operation_s=2e-9)
    work = Work(1, 1000, 1000, 1000, 0)
    took_s = predicted_s(rates, work, chunk_shares(6), 10_000, 10**9)
    assert took_s == pytest.approx(10_000 * 2e-6 * (1 + 1 / 10), rel=0.01)


def test_few_rows_tell_what_a_pass_takes() -> None:
    """Ten times slower links are worth another pass over the weights, and not one that takes twenty times as long."""
    pace = Pace(LocalTransport(), WORK, torch.device("cpu"))

    def choose() -> int:
        return best_chunks(CPU.scaled(exchange=10.0, passes=pace.passes.value), WORK, 512, 4)

    assert choose() > 1
    pace.saw_products(8, 20 * products_s(CPU, WORK, 0), 1.0)
    assert choose() == 1


def test_all_ranks_choose_the_same_number_from_what_they_measured() -> None:
    def choose(transport: Transport) -> list[int]:
        pace = Pace(transport, WORK, torch.device("cpu"))
        first, _ = pace.choose(4096 * transport.rank, False)
        if transport.rank == 1:  # one slow link is everybody's
            pace.saw_exchange([1000], 0.1, 0.1, 0.001)
        return [first, pace.choose(4096 * transport.rank, False)[0]]

    chosen = LocalWorld(3).run(choose)
    assert chosen[0] == chosen[1] == chosen[2]
    assert chosen[0][0] != chosen[0][1]


def test_measured_times_move_the_prediction() -> None:
    pace = Pace(LocalTransport(), WORK, torch.device("cpu"))
    operations_s = CPU.operation_s * WORK.row_operations * 500
    expected_s = CPU.pass_s + CPU.weight_byte_s * WORK.weight_bytes + operations_s
    pace.saw_products(500, expected_s + 2 * operations_s, 1.0)
    assert pace.products.value == pytest.approx(3.0)
    pace.saw_products(500, expected_s, 1.0)
    assert pace.products.value == pytest.approx(2.0)
    pace.saw_products(0, 1.0, 1.0)
    assert pace.passes.value == 1.0, "without rows no weights are read"
    row_s = CPU.operation_s * WORK.row_operations
    pace.saw_products(1, 2 * 5 * (expected_s - operations_s) + 2 * row_s, 1.0, passes=2)
    assert pace.products.value == pytest.approx(2.0), "one row tells nothing about rates"
    assert pace.passes.value == pytest.approx(5.0)
    pace.saw_products(500, 5 * (expected_s - operations_s) + 3 * operations_s, 1.0)
    assert pace.products.value == pytest.approx(2.5), "what a pass takes is none of it"


def test_what_the_processor_does_for_an_exchange_is_not_hidden() -> None:
    """Where it is all there is, chunks only cost; and what ranks that share cores do takes as much longer."""
    rows, worked_s = 4096 * 8, 0.2

    def choose(transport: Transport) -> tuple[float, float, int, int]:
        pace = Pace(transport, WORK, torch.device("cpu"))
        products_s = CPU.operation_s * WORK.row_operations * rows / 10
        pace.saw_products(rows, 2 * products_s, products_s)
        pace.saw_exchange([rows], 2 * worked_s, worked_s, worked_s)
        link, idle = pace.in_chunks.exchange.value, pace.choose(4096, False)[0]
        for _ in range(3):
            pace.saw_exchange([rows], 12 * worked_s, 10 * worked_s, worked_s)
        return pace.crowding.value, link, idle, pace.choose(4096, False)[0]

    for crowding, link, idle, busy in LocalWorld(2).run(choose):
        assert crowding == pytest.approx(2.0)
        assert link < 1.0 and idle == 1, "all of the time was the processor's"
        assert busy > 1, "now it is the link that takes most of it"


def test_near_rows_are_computed_first_where_they_are_worth_a_pass_over_the_weights() -> None:
    def choose(transport: Transport) -> list[tuple[int, int]]:
        pace = Pace(transport, WORK, torch.device("cpu"), nodes=2)
        pace.in_chunks.exchange.towards(30.0)
        found = [pace.choose(4096, False)]
        pace.work = replace(WORK, weight_bytes=WORK.weight_bytes * 100)
        found.append(pace.choose(4096, False))
        return [*found, pace.choose(1, False)]

    for few, many, one in LocalWorld(2).run(choose):
        assert few[0] > 1 and few[1] == 2
        assert many == (1, 5), "two passes hide more than they cost, and three do not"
        assert one == (1, 1)


def test_far_rows_are_computed_amid_near_ones_where_passes_weigh_more_than_ends() -> None:
    light = replace(WORK, weight_bytes=3 * 512 * 256 * 2 * 4, row_operations=6 * 512 * 256)

    def choose(transport: Transport, nodes: int) -> list[tuple[int, int]]:
        pace = Pace(transport, WORK, torch.device("cpu"), nodes)
        pace.in_chunks.exchange.towards(4.0)
        found = [pace.choose(tokens, whole=False) for tokens in (1, 512)]
        found.append(pace.choose(512, whole=transport.rank == 1))  # one that asks for gradients decides for all
        pace.work = light  # for which a pass is next to nothing, but not four calls
        return [*found, pace.choose(1, whole=False)]

    for nodes, portions in ((1, 1), (2, 5)):
        expected = [(1, 1), (1, portions), (1, 1), (1, 1)]
        assert LocalWorld(2).run(lambda t, n=nodes: choose(t, n)) == [expected] * 2  # type: ignore[misc]


def test_slow_chunks_do_not_make_rows_amid_others_look_slow() -> None:
    """What a chunk's two legs took says little about the slow leg alone: once both are known, each has its own."""

    def choose(transport: Transport) -> list[int]:
        pace, rows = Pace(transport, WORK, torch.device("cpu"), nodes=2), 512 * WORK.top_k
        link_s = CPU.byte_s * WORK.row_bytes * rows / 2

        def saw(factor: float, chunks: int, portions: int) -> int:
            sent = [round(rows * share) for share in chunk_shares(chunks)]
            took_s = CPU.exchange_s + factor * link_s * sent[0] / rows
            pace.saw_exchange(sent, took_s, took_s, 0.0, portions)
            return pace.choose(512, whole=False)[1]

        return [saw(4.0, 1, 5), saw(100.0, 3, 1), saw(4.0, 1, 5)]

    assert LocalWorld(2).run(choose) == [[5, 5, 5]] * 2


def test_what_was_slow_once_is_tried_again() -> None:
    def choose(transport: Transport) -> list[int]:
        pace, rows = Pace(transport, WORK, torch.device("cpu"), nodes=2), 512 * WORK.top_k
        pace.saw_exchange([rows], 10.0, 10.0, 0.0, 5)
        chosen = []
        for _ in range(60):
            chosen.append(pace.choose(512, whole=False)[1])
            took_s = 4 * CPU.byte_s * WORK.row_bytes * rows / 2
            pace.saw_exchange([rows], took_s, took_s, 0.0, chosen[-1])
        return chosen

    for chosen in LocalWorld(2).run(choose):
        assert chosen[0] != 5 and chosen[-1] == 5


def test_what_was_learned_stays_where_later_calls_are_too_small_to_learn_from() -> None:
    pace = Pace(LocalTransport(), WORK, torch.device("cpu"), nodes=2)
    pace.transport.world_size = 2
    pace.saw_exchange([4096], 1.0, 1.0, 0.0, 5)
    learned = pace.amid.exchange.value
    assert learned > 1
    for _ in range(9):
        pace.saw_exchange([1], 1e-3, 1e-3, 0.0, 1)
    assert pace.amid.exchange.value == learned
    for _ in range(9):
        pace.saw_exchange([4096], 10.0, 10.0, 0.0, 1)
    assert pace.amid.exchange.value == learned, "what is slower in chunks is not slower amid others"


def test_a_rank_without_rows_says_nothing_about_their_cost() -> None:
    pace = Pace(LocalTransport(), WORK, torch.device("cpu"))
    pace.saw_exchange([0], 1.0, 1.0, 1.0)
    assert not pace.in_chunks.handling.is_known and not pace.in_chunks.exchange.is_known


def test_what_is_sent_behind_the_first_chunk_is_work_too() -> None:
    pace, rows = Pace(LocalTransport(), WORK, torch.device("cpu"), nodes=2), 1000
    whole_s = CPU.handling_s + CPU.handled_byte_s * WORK.back_bytes * rows
    pace.saw_exchange([rows, rows, rows], 1.0, 1.0, 2 * whole_s)
    assert pace.in_chunks.handling.value == pytest.approx(1.0), "three are sent and one has come"
    pace.saw_exchange([rows], 1.0, 1.0, whole_s)
    assert pace.in_chunks.handling.value == pytest.approx(1.0)
    assert not pace.amid.handling.is_known


def test_what_rows_amid_others_hide() -> None:
    """Where links are the bound, both ways and the products between them add up; each call takes pass_s."""
    rates = Rates(exchange_s=0.0, pass_s=1e-3, weight_byte_s=0.0, byte_s=1e-6, operation_s=1e-6)
    work = Work(1, 1000, 2000, 1000, 0)
    link_s, near_s, far_s = 10 * 1e-3 / 2, 4e-3 + 5 * 1e-3, 1e-3 + 5 * 1e-3
    slow, fast = rates.scaled(exchange=10.0), rates.scaled(exchange=1e-3)
    assert amid_s(slow, work, 10, 2, 2) == pytest.approx(30 * link_s + 0.25 * near_s + far_s)
    assert amid_s(fast, work, 10, 2, 2) == pytest.approx(near_s + far_s)


def test_rows_amid_others_are_not_chosen_where_streams_would_wait_for_them() -> None:
    def choose(transport: Transport, device: str) -> bool:
        pace = Pace(transport, WORK, torch.device(device), nodes=2)
        pace.rates = CPU.scaled(exchange=4.0)
        return pace.choose(512, whole=False) == (1, 5)

    for device in ("cpu", "cuda"):
        assert LocalWorld(2).run(lambda t, d=device: choose(t, d)) == [device == "cpu"] * 2  # type: ignore[misc]


def test_products_in_two_passes_are_not_taken_for_slow() -> None:
    pace = Pace(LocalTransport(), WORK, torch.device("cpu"))
    pass_s = CPU.pass_s + CPU.weight_byte_s * WORK.weight_bytes
    operations_s = CPU.operation_s * WORK.row_operations * 500
    pace.saw_products(500, 2 * pass_s + 3 * operations_s, 1.0, passes=2)
    assert pace.products.value == pytest.approx(3.0)
