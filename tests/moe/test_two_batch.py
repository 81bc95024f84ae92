"""Two halves of a batch in turn: the bits of the whole, one order of collectives on all ranks, and time won."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossdock import EPGroup, LocalWorld, MoEConfig, MoELayer, make_transport
from crossdock.comm import LocalTransport, Transport
from crossdock.moe import ExchangeConfig
from crossdock.moe.trace import Recorder, Watched
from crossdock.moe.two_batch import Steps, interleave, run
from tests.launch import Ranks
from tests.moe.links import Asleep, Noting, Slow, noise
from tests.moe.test_pipeline import build

LENGTHS = [5, 1, 7, 4]  # tokens of four sequences


class Attention(nn.Module):
    """Stands for attention: a token is mixed with the mean of its sequence's tokens up to it, sequence by sequence."""

    def forward(self, x_TD: Tensor, lengths: list[int]) -> Tensor:
        return torch.cat([x_TD[:0]] + [part.cumsum(0).tanh() for part in torch.split(x_TD, lengths)])


class Decoder(nn.Module):
    """Two decoder layers, of which `stages` pauses as their MoE layers do."""

    def __init__(self, transport: Transport, exchange: ExchangeConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.mlp = nn.ModuleList(build(transport, exchange) for _ in range(2))

    def stages(self, x_TD: Tensor, lengths: list[int]) -> Steps[Tensor]:
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x_TD = x_TD + attention(x_TD, lengths)
            assert isinstance(mlp, MoELayer)
            x_TD = x_TD + (yield from mlp.stages(x_TD))
        return x_TD


def decode(transport: Transport, lengths: list[int], halves: bool, chunks: int = 1) -> Tensor:
    """The hidden states of these sequences, in one batch or two."""
    decoder = Decoder(transport, ExchangeConfig(chunks=chunks))
    x_TD = noise(sum(LENGTHS), 36, seed=7)[: sum(lengths)]
    with torch.no_grad():
        if not halves:
            return run(decoder.stages(x_TD, lengths))
        first = lengths[: len(lengths) // 2]
        batches = (x_TD[: sum(first)], first), (x_TD[sum(first) :], lengths[len(first) :])
        return torch.cat(interleave([decoder.stages(*batch) for batch in batches]))


def decode_in_group(group: EPGroup, lengths: list[list[int]]) -> Tensor:
    return decode(make_transport(group), lengths[group.rank], halves=True)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("lengths", [[LENGTHS, LENGTHS], [LENGTHS, []], [[5], LENGTHS]])
def test_halves_have_the_bits_of_the_whole(lengths: list[list[int]], chunks: int) -> None:
    for found, own in zip(LocalWorld(2).run(lambda t: decode(t, lengths[t.rank], True, chunks)), lengths, strict=True):
        assert torch.equal(found, decode(LocalTransport(), own, halves=False))


def test_halves_have_the_bits_of_the_whole_between_processes(ranks_of_two: Ranks) -> None:
    for found, own in zip(ranks_of_two.run(decode_in_group, [LENGTHS, [5]]), (LENGTHS, [5]), strict=True):
        assert torch.equal(found, decode(LocalTransport(), own, halves=False))


def test_ranks_keep_one_order_and_halves_alternate() -> None:
    def phases(transport: Transport) -> list[str]:
        noting = Noting(transport)
        decode(noting, [LENGTHS, [], [5], []][transport.rank], halves=True)
        return [note for note in noting.notes if not note.startswith("plan")]

    first, *others = LocalWorld(4).run(phases)
    assert all(other == first for other in others)
    one_layer = ["dispatch of exchange 1", "dispatch of exchange 2", "combine of exchange 1", "combine of exchange 2"]
    assert sorted(first) == sorted(2 * one_layer)
    assert first[:3] == one_layer[:3]


def test_a_half_that_fails_ends_the_other() -> None:
    ended = []

    def steady() -> Iterator[None]:
        try:
            while True:
                yield
        finally:
            ended.append("steady")

    def failing() -> Iterator[None]:
        yield
        raise ValueError("half")

    halves: Any = [steady(), failing()]
    with pytest.raises(ValueError, match="half"):
        interleave(halves)
    assert ended == ["steady"]


def test_steps_of_unequal_length_all_end() -> None:
    def count(pauses: int) -> Steps[int]:
        for _ in range(pauses):
            yield
        return pauses

    assert interleave([count(n) for n in (3, 0, 1)]) == [3, 0, 1]
    assert interleave([]) == []
    assert run(count(2)) == 2


SIZE = 2048
CONFIG_ASLEEP = MoEConfig(hidden_size=SIZE, expert_size=8, num_experts=8, top_k=2)


def hidden(group: EPGroup, halves: bool) -> float:
    """The fraction hidden over two layers whose attention takes as long as their exchange."""
    tokens, seconds = 64, 0.3
    rows = tokens * CONFIG_ASLEEP.top_k
    recorder = Recorder()
    transport = Watched(Slow(make_transport(group), seconds / (rows * SIZE * 2)), recorder)
    layers: Any = [MoELayer(CONFIG_ASLEEP, transport) for _ in range(2)]
    for layer in layers:
        layer.router.weight.data.copy_(noise(8, SIZE, seed=1))
        layer.experts = Asleep(seconds / 2 / rows)
    attention = Asleep(seconds / tokens)

    def stages(x_TD: Tensor) -> Steps[Tensor]:
        for layer in layers:
            x_TD = yield from layer.stages(attention(x_TD))
        return x_TD

    x_TD = noise(tokens, SIZE, seed=2).bfloat16()
    with torch.no_grad():
        interleave([stages(part) for part in x_TD.split(tokens // 2 if halves else tokens)])
    fraction = recorder.hidden()
    assert fraction is not None
    return fraction


def test_attention_of_one_half_hides_the_rows_of_the_other(ranks_of_two: Ranks) -> None:
    """Three attempts: a busy machine may disturb one."""
    found = ((max(ranks_of_two.run(hidden, False)), min(ranks_of_two.run(hidden, True))) for _ in range(3))
    assert any(whole < 0.2 and in_halves > 0.6 for whole, in_halves in found)
