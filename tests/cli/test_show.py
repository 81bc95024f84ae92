"""Text as it comes, and the load of experts over ranks."""

import io
from pathlib import Path

import torch

from crossdock.cli.generate import expert_load
from crossdock.cli.request import Request
from crossdock.cli.runtime import Runtime
from crossdock.cli.show import TextStream
from crossdock.comm import LocalTransport
from crossdock.moe import MoEConfig, MoELayer
from crossdock.parallel import EPGroup


class BytesTokenizer:
    """Token i is byte i."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_half_a_character_is_held_back() -> None:
    text = "naïve €"
    request = Request(Path(), {}, BytesTokenizer(), [list(b"> ")], 8)  # type: ignore[arg-type]
    out = io.StringIO()
    stream = TextStream(request, out)
    for token in text.encode():
        stream(0, token)
        assert "�" not in out.getvalue()
    stream.close()
    assert out.getvalue() == f"> {text}\n"


def test_a_text_that_ends_in_half_a_character_is_shown_at_the_end() -> None:
    out = io.StringIO()
    stream = TextStream(Request(Path(), {}, BytesTokenizer(), [[65]], 8), out)  # type: ignore[arg-type]
    stream(0, "é".encode()[0])
    stream.close()
    assert out.getvalue() == "A�\n"


def test_ids_where_there_is_no_tokenizer() -> None:
    out = io.StringIO()
    stream = TextStream(Request(Path(), {}, None, [[5, 6]], 8), out)
    assert out.getvalue() == ""  # nothing is on stdout if the first step fails
    stream(0, 7)
    stream.close()
    assert out.getvalue() == "prompt [5, 6]\n7 \n"


class TwoRanks(LocalTransport):
    """Rank 0 of two, whose other rank counted the same."""

    world_size = 2

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        return [values, values]


def test_expert_load_is_summed_over_layers_and_ranks() -> None:
    config = MoEConfig(hidden_size=8, expert_size=8, num_experts=4, top_k=2)
    transport = TwoRanks()
    layers = torch.nn.ModuleList(MoELayer(config, transport, dtype=torch.float32) for _ in range(2))
    layers[0].load_E.copy_(torch.tensor([1, 2, 3, 4]))
    layers[1].load_E.copy_(torch.tensor([10, 0, 0, 0]))
    topology = EPGroup.solo().topology
    group = EPGroup(0, 2, torch.device("cpu"), None, topology, 1.0)
    load = expert_load(layers, Runtime(group, transport))
    assert load == {"per_rank": [26, 14], "balancedness": 20 / 26}
    for layer in layers:
        layer.load_E.zero_()
    assert expert_load(layers, Runtime(group, transport)) == {"per_rank": [0, 0], "balancedness": 1.0}
