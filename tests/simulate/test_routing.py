"""Routing that is drawn: distinct experts, the probabilities asked for, the same for the same seed."""

import doctest
import json
import subprocess
import sys
from itertools import permutations
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock import simulate
from crossdock.errors import ConfigError
from crossdock.parallel import ExpertPlacement, rebalance
from crossdock.simulate import (
    SHAPES,
    Drawn,
    LayerShape,
    Slots,
    Traced,
    popularity,
    rank_choices,
    read_routing,
    routing,
    sample_experts,
    timeline,
    traffic,
)

SMALL = LayerShape(64, 32, 8, 2)


def test_predictions_need_no_torch() -> None:
    """What uses a placement of the balancer's imports it then."""
    code = "import sys, crossdock.simulate; assert not {'torch', 'triton'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [simulate, timeline, traffic], ids=lambda module: module.__name__)
def test_worked_examples_are_true(module: object) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted > 0 and results.failed == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.floats(0.0, 4.0), st.integers(0, 9), st.data())
def test_experts_are_distinct_and_of_few_groups(
    size: int, groups: int, skew: float, seed: int, data: st.DataObject
) -> None:
    experts, top_groups = groups * size * 2, data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size * 2))
    rng = np.random.default_rng(seed)
    ids_TK = sample_experts(rng, 50, popularity(experts, skew), top_k, groups, top_groups)
    assert ids_TK.shape == (50, top_k) and ids_TK.min() >= 0 and ids_TK.max() < experts
    for ids in ids_TK.tolist():
        assert len(set(ids)) == top_k and len({i // (2 * size) for i in ids}) <= top_groups


def in_order(weights: list[float], order: tuple[int, ...]) -> float:
    """The probability of drawing exactly these, one after another, each among those that are left."""
    left = [sum(weights) - sum(weights[i] for i in order[:k]) for k in range(len(order))]
    return prod(weights[i] / rest for i, rest in zip(order, left, strict=True))


@pytest.mark.parametrize("passes", [routing.PASSES, 0], ids=["drawn again", "by score"])
def test_probabilities_are_those_of_drawing_one_after_another(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PASSES", passes)
    weights, tokens = [5.0, 2.0, 0.0, 1.0], 60_000
    ids_TK = sample_experts(np.random.default_rng(3), tokens, np.array(weights), 2)
    seen = np.bincount(ids_TK[:, 0] * 4 + ids_TK[:, 1], minlength=16) / tokens
    for order in permutations(range(4), 2):
        expected = in_order(weights, order)
        assert abs(seen[order[0] * 4 + order[1]] - expected) < 5 * (expected * (1 - expected) / tokens) ** 0.5 + 1e-9


def test_groups_are_drawn_by_their_weight() -> None:
    """Of two groups of loads 3 and 1 the first is taken by three tokens in four."""
    ids_TK = sample_experts(np.random.default_rng(0), 40_000, np.array([2.0, 1.0, 0.5, 0.5]), 1, 2, 1)
    assert abs(float((ids_TK < 2).mean()) - 0.75) < 0.011


def test_a_rank_draws_the_same_whatever_the_others_do() -> None:
    """A benchmark of the past can be checked only while the stream is what it was."""
    first = [[3, 10, 40, 0, 1, 2, 34, 16], [40, 2, 0, 3, 16, 6, 44, 14]]
    assert rank_choices("skewed", 0, 4, 64, 8)[:2].tolist() == first
    assert rank_choices("random", 1, 5, 64, 8).dtype == np.int64
    assert (rank_choices("random", 1, 5, 64, 8) != rank_choices("random", 2, 5, 64, 8)).any()


def test_skew_makes_the_first_experts_popular() -> None:
    counts = np.bincount(rank_choices("skewed", 0, 4000, 64, 8).reshape(-1), minlength=64)
    assert counts[0] > 1.3 * counts[4] > 1.3 * counts[63]
    even = np.bincount(rank_choices("random", 0, 4000, 64, 8).reshape(-1), minlength=64)
    assert even.max() < 1.25 * even.min()


def test_a_workload_follows_its_seed_and_covers_all_ranks() -> None:
    first, second, other = (np.concatenate(list(Drawn.skewed(SMALL, 1.0, seed).blocks(5, 7))) for seed in (1, 1, 2))
    assert first.shape == (5, 7, 2) and (first == second).all() and (first != other).any()


def test_a_trace_goes_round() -> None:
    ids_TK = np.arange(6, dtype=np.int32).reshape(3, 2)
    blocks = list(Traced(ids_TK).blocks(2, 2))
    assert [block.tolist() for block in blocks] == [[[[0, 1], [2, 3]]], [[[4, 5], [0, 1]]]]


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_traces_and_loads_are_read(tmp_path: Path, suffix: str) -> None:
    def write(data: list[object]) -> Path:
        path = tmp_path / f"routing{suffix}"
        np.save(path, np.array(data)) if suffix == ".npy" else path.write_text(json.dumps(data))
        return path

    trace = read_routing(write([[0, 7], [3, -1]]), SMALL)
    assert isinstance(trace, Traced) and trace.ids_TK.tolist() == [[0, 7], [3, -1]]
    drawn = read_routing(write([0.0, 0.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0]), SMALL)
    assert {*np.concatenate(list(drawn.blocks(1, 20))).reshape(-1).tolist()} == {2, 3}


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ([[0, 8]], "ids in -1..7, found 8"),
        ([[0, -2]], "found -2"),
        ([[0, 1, 2]], r"found int64 \[1, 3\]"),
        ([[0.5, 1.0]], "found float64"),
        ([1.0, 2.0], r"8 loads, found float64 \[2\]"),
        ([[0, 1], [2]], "cannot be read"),
        ({"a": 1}, "must hold integers"),
    ],
)
def test_bad_traces(tmp_path: Path, data: object, names: str) -> None:
    path = tmp_path / "routing.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=names):
        read_routing(path, SMALL)


def test_bad_routing(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.npy", tmp_path / "text.npy"):
        if path.name == "text.npy":
            path.write_text("no array")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_routing(path, SMALL)
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="a token needs 3 experts, but may have only 2"):
        sample_experts(rng, 1, np.array([1.0, 1.0, 0.0]), 3)
    with pytest.raises(ConfigError, match="only 1 with any load"):
        sample_experts(rng, 1, np.array([1.0, 0.0, 1.0, 1.0]), 2, 2, 1)
    with pytest.raises(ConfigError, match="at least 0"):
        sample_experts(rng, 1, np.array([1.0, -1.0]), 1)
    with pytest.raises(ConfigError, match="3 groups"):
        sample_experts(rng, 1, np.ones(4), 1, 3, 1)
    with pytest.raises(ConfigError, match="skew"):
        popularity(4, float("nan"))
    with pytest.raises(ConfigError, match="random, skewed"):
        rank_choices("even", 0, 1, 4, 2)


def test_slots_are_those_of_the_placement() -> None:
    """A balanced placement's slots are the balancer's, and tokens take the replicas that `ExpertPlacement` says."""
    load_E = np.array([90.0, 30.0, 20.0, 10.0, 5.0, 5.0, 5.0, 5.0])
    slots = Slots.balanced(load_E, 4, 2, 2, 1)
    placed = rebalance(torch.tensor(load_E)[None], 12, 2, 2, 4)[0][0]
    placement = ExpertPlacement(8, 4, tuple(placed.tolist()))
    ids_BTK = np.random.default_rng(0).integers(-1, 8, (2, 9, 3)).astype(np.int32)
    for ids_TK, chosen_TK in zip(ids_BTK, slots.choose(ids_BTK), strict=True):
        assert chosen_TK.tolist() == placement.slot_ids(torch.tensor(ids_TK, dtype=torch.int64)).tolist()


def test_more_ranks_than_experts_repeat_them() -> None:
    slots = Slots.contiguous(4, 8)
    assert slots.per_rank == 1 and slots.expert_of_P.tolist() == [0, 1, 2, 3] * 2
    assert slots.choose(np.array([[[3], [3], [0]]], dtype=np.int32)).tolist() == [[[3], [7], [0]]]
    assert Slots.contiguous(6, 4).expert_of_P.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert Slots.contiguous(SHAPES["qwen3-30b"].experts, 4).expert_of_P.tolist() == list(range(128))
