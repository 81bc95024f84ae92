"""Overlap in whole models: two halves of a batch in turn, and chunks, give the tokens and bits of neither."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock import LocalWorld, generate, load_model
from crossdock.comm import LocalTransport, Transport
from crossdock.models.cache import PagedCache, Sequence
from crossdock.models.generate import Generation
from crossdock.moe import ExchangeConfig
from tests.models.checkpoints import add_mtp, save

PROMPTS = [[5, 17, 9, 33, 21, 4, 8], [3, 1, 4], [2, 7, 1, 8, 2, 8], [9], [4, 4]]


def run(directory: Path, transport: Transport, draft_tokens: int = 0, **options: Any) -> Generation:
    model = load_model(directory, transport, dtype=torch.float32, **options).model
    return generate(model, PROMPTS, transport, max_new_tokens=8, draft_tokens=draft_tokens)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_two_batches_change_no_bit(family: str, tmp_path: Path) -> None:
    """Four ranks: one has two sequences, the others one, so that one of their halves is empty."""
    save(family, tmp_path)
    expected = run(tmp_path, LocalTransport())
    for options in ({"two_batch": True}, {"two_batch": True, "exchange": ExchangeConfig(chunks=2)}):
        found = LocalWorld(4).run(lambda t, o=options: run(tmp_path, t, **o))[0]
        assert found.outputs == expected.outputs


def test_two_batches_change_no_bit_of_speculation(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path)
    add_mtp(tmp_path, 0.85)
    expected = run(tmp_path, LocalTransport())
    found = LocalWorld(2).run(lambda t: run(tmp_path, t, draft_tokens=2, two_batch=True))[0]
    assert found.outputs == expected.outputs and found.drafted > 0


@pytest.mark.parametrize("counts", [[], [4], [1, 1], [9, 1, 1], [2, 3, 4, 5]])
def test_halves_hold_all_sequences(counts: list[int]) -> None:
    cache = PagedCache(1, 4, 16, 8, torch.float32, torch.device("cpu"))
    batch = cache.batch([(Sequence(), count, False) for count in counts])
    first, second = batch.halves()
    assert torch.equal(torch.cat([first.rows_T, second.rows_T]), batch.rows_T)
    assert torch.equal(torch.cat([first.positions_T, second.positions_T]), batch.positions_T)
    for half in (first, second):
        assert [span.start for span in half.spans] == [0, *(span.stop for span in half.spans)][: len(half.spans)]
        assert sum(span.stop - span.start for span in half.spans) == len(half.rows_T)
    assert [s.pages for half in (first, second) for s in half.spans] == [span.pages for span in batch.spans]
    assert abs(len(first.rows_T) - len(second.rows_T)) <= max(counts, default=0)
