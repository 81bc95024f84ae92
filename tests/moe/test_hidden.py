"""How much of the traffic chunks hide, between processes over a slow link."""

from collections.abc import Iterator
from typing import Any

import torch

from crossdock import EPGroup, MoEConfig, MoELayer, make_transport
from crossdock.moe import ExchangeConfig
from crossdock.moe.pace import CPU, Work
from crossdock.moe.trace import Recorder, Watched
from crossdock.parallel import Topology
from tests.launch import Ranks
from tests.moe.links import Asleep, Slow, noise

HIDDEN = 2048
SLEEPING = MoEConfig(hidden_size=HIDDEN, expert_size=8, num_experts=8, top_k=2)
SECONDS = 0.6  # that all rows of a call are on the link


def hidden(group: EPGroup, chunks: int, compute: float, shared: float, portions: int = 0) -> tuple[float, int]:
    """The fraction hidden in the third call, and its dispatches; `compute` and `shared` are times over the link's.

    In portions over nodes, where these are given: each rank is a node.
    """
    tokens = 256
    rows = tokens * SLEEPING.top_k
    transport = Slow(make_transport(group), SECONDS / (rows * HIDDEN * 2))  # half of a rank's rows travel, both ways
    recorder = Recorder()
    if portions:
        transport.topology = Topology((0, 1))
    exchange = ExchangeConfig("node" if portions else "flat", chunks=chunks)
    layer: Any = MoELayer(SLEEPING, Watched(transport, recorder), exchange=exchange)
    layer.router.weight.data.copy_(noise(8, HIDDEN, seed=1))
    x_TD = noise(tokens, HIDDEN, seed=2 + group.rank).bfloat16()
    layer.experts = Asleep(compute * SECONDS / rows)
    if layer.pipeline.pace is not None:  # as if the experts were as much work as they take, and not kept from a core
        pace, saw = layer.pipeline.pace, layer.pipeline.pace.saw_products
        pace.work = Work(2, HIDDEN * 2, HIDDEN * 2, round(layer.experts.s_a_row / CPU.operation_s), 0)
        pace.saw_products = lambda rows, took_s, worked_s, passes: saw(rows, took_s, took_s, passes)
    if portions:
        layer.pipeline.pace.choose = lambda *_: (1, portions)
    layer.shared_experts = Asleep(shared * SECONDS / tokens) if shared else None
    with torch.no_grad():
        for _ in range(3 if chunks == 0 and not portions else 1):
            recorder.clear()
            layer(x_TD)
    fraction = recorder.hidden()
    assert fraction is not None
    return fraction, sum(flight.phase.startswith("dispatch") for flight in recorder.flights)


def least_hidden(
    ranks: Ranks, chunks: int, compute: float, shared: float, portions: int = 0
) -> Iterator[tuple[float, int]]:
    """The fraction on the rank that hides least, and its dispatches; three times, as a busy machine may disturb one."""
    return (min(ranks.run(hidden, chunks, compute, shared, portions)) for _ in range(3))


def test_four_chunks_hide_most_of_the_traffic(ranks_of_two: Ranks) -> None:
    """With products as long as the traffic and a shared expert, all that is left in sight is the last return."""
    assert any(fraction >= 0.8 and count == 4 for fraction, count in least_hidden(ranks_of_two, 4, 1.0, 0.15))


def test_chosen_chunks_hide_most_of_the_traffic(ranks_of_two: Ranks) -> None:
    """Without a shared expert, and with products half as long again: the cost model knows to take more than two."""
    assert any(fraction >= 0.8 and count > 2 for fraction, count in least_hidden(ranks_of_two, 0, 1.5, 0.0))


def test_one_chunk_hides_its_traffic_between_nodes_in_portions(ranks_of_two: Ranks) -> None:
    """Both ways, once a quarter of the node's own products takes as long as one way."""
    assert any(fraction >= 0.8 for fraction, _ in least_hidden(ranks_of_two, 0, 4.0, 0.0, 5))
    assert any(fraction < 0.3 for fraction, _ in least_hidden(ranks_of_two, 0, 4.0, 0.0, 1))


def test_one_chunk_hides_little(ranks_of_two: Ranks) -> None:
    assert any(fraction < 0.3 and count == 1 for fraction, count in least_hidden(ranks_of_two, 1, 1.0, 0.15))
