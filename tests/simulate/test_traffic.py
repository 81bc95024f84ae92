"""Rows counted: equal to loops over every token, to closed forms, and to what dispatchers give their transport."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.comm import LocalWorld, Pending, Transport, make_dispatcher
from crossdock.moe.pipeline import chunk_slices
from crossdock.moe.wire import Fp8Wire
from crossdock.parallel import Topology
from crossdock.simulate import (
    PRESETS,
    Drawn,
    LayerShape,
    Slots,
    Traffic,
    chunk_bounds,
    count_chunks,
    count_traffic,
)
from crossdock.simulate.cost import Costs
from crossdock.simulate.stages import FlatStages, NodeStages, index_together, slots_together

PAIRS = PRESETS["h100-400g"].changed({"ranks_per_node": 2})


def counted(ids_WTK: np.ndarray, slots: Slots, ranks_per_node: int) -> Traffic:
    """All tokens of all ranks as one part."""
    [traffic] = count_traffic([ids_WTK], slots, ranks_per_node, [0, ids_WTK.shape[1]])
    return traffic


def by_loops(slots_WTK: np.ndarray, per_rank: int, size: int) -> dict[str, np.ndarray]:
    """What the schedules send, one token at a time: [a, b] are rows from a to b."""
    ranks = len(slots_WTK)
    found = {name: np.zeros((ranks, ranks), dtype=np.int64)
             for name in ("flat", "once", "rail", "near", "far", "near once", "far once", "ring")}  # fmt: skip
    for rank in range(ranks):
        home, index = divmod(rank, size)
        for chosen in slots_WTK[rank].tolist():
            there = [slot // per_rank for slot in chosen if slot >= 0]
            for one in there:
                found["flat"][rank, one] += 1
                stands_in = (one // size) * size + index
                found["near" if one // size == home else "far"][stands_in, one] += 1
            for one in set(there):
                found["once"][rank, one] += 1
                found["near once" if one // size == home else "far once"][(one // size) * size + index, one] += 1
            nodes = {one // size for one in there}
            for node in nodes - {home}:
                found["rail"][rank, node * size + index] += 1
            hops = max(((node - home) % (ranks // size) for node in nodes), default=0)
            for hop in range(hops):
                here, there_node = ((home + hop + step) % (ranks // size) for step in (0, 1))
                found["ring"][here * size + index, there_node * size + index] += 1
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.integers(1, 4), st.integers(0, 99)
)
def test_counts_are_those_of_loops(nodes: int, size: int, per_rank: int, tokens: int, top_k: int, seed: int) -> None:
    rng, ranks = np.random.default_rng(seed), nodes * size
    experts = ranks * per_rank
    ids_WTK = rng.integers(-1, experts, (ranks, tokens, top_k)).astype(np.int32)
    traffic, expected = counted(ids_WTK, Slots.contiguous(experts, ranks), size), by_loops(ids_WTK, per_rank, size)
    found = {
        "flat": traffic.flat_WW,
        "once": traffic.once_WW,
        "rail": traffic.rail_WW,
        "near": traffic.inside(traffic.flat_WW, False),
        "far": traffic.inside(traffic.flat_WW, True),
        "near once": traffic.inside(traffic.once_WW, False),
        "far once": traffic.inside(traffic.once_WW, True),
    }
    for name, rows_WW in found.items():
        assert (rows_WW == expected[name]).all(), name
    assert (traffic.ring_NM.reshape(-1) == expected["ring"].sum(1)).all()
    assert traffic.rows_P.tolist() == np.bincount(ids_WTK[ids_WTK >= 0], minlength=experts).tolist()
    assert traffic.tokens_W.tolist() == [tokens] * ranks


def test_distinct_nodes_are_as_many_as_probability_says() -> None:
    """A node of 32 of 256 experts has none of a token's 8 with probability C(224, 8) / C(256, 8)."""
    shape = LayerShape(8, 8, 256, 8)
    traffic = count_traffic(Drawn.skewed(shape).blocks(64, 256), Slots.contiguous(256, 64), 8, [0, 256])[0]
    expected = 8 * (1 - comb(224, 8) / comb(256, 8))
    assert traffic.outer_WN.sum() / traffic.tokens_W.sum() == pytest.approx(expected, rel=0.01)
    ranks = 64 * (1 - comb(252, 8) / comb(256, 8))
    assert traffic.once_WW.sum() / traffic.tokens_W.sum() == pytest.approx(ranks, rel=0.01)


def test_limited_groups_reach_few_nodes() -> None:
    """Eight groups, one a node: a token that takes four groups crosses to four nodes at most."""
    shape = LayerShape(8, 8, 256, 8, num_groups=8, top_groups=4)
    traffic = count_traffic(Drawn.skewed(shape).blocks(64, 64), Slots.contiguous(256, 64), 8, [0, 64])[0]
    assert 3.5 < traffic.outer_WN.sum() / traffic.tokens_W.sum() <= 4.0


@pytest.mark.parametrize("tokens", [0, 1, 5, 12, 97])
def test_chunks_are_those_of_the_layer_and_add_up(tokens: int) -> None:
    for chunks in (1, 2, 3, 4, 8):
        slices = chunk_slices(tokens, chunks)
        assert chunk_bounds(tokens, chunks) == [slices[0].start, *(each.stop for each in slices)]
    ids_WTK = np.random.default_rng(0).integers(0, 8, (4, tokens, 2)).astype(np.int32)
    slots = Slots.contiguous(8, 4)
    by_count = count_chunks([ids_WTK[:1], ids_WTK[1:]], slots, 2, tokens, (1, 3, 4))
    whole = counted(ids_WTK, slots, 2)
    for chunks, parts in by_count.items():
        assert len(parts) == chunks
        assert (sum(parts[1:], parts[0]).flat_WW == whole.flat_WW).all()
        for part, each in zip(parts, chunk_slices(tokens, chunks), strict=True):
            assert (part.outer_WN == counted(ids_WTK[:, each], slots, 2).outer_WN).all()


@dataclass(eq=False)
class Recording:
    """A transport that adds up the bytes it is given, [from, to] in ranks of the world, by the start of the phase."""

    inner: Transport
    sent: dict[str, np.ndarray] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def split(self, parts: Sequence[Sequence[int]]) -> "Recording":
        return Recording(self.inner.split(parts), self.sent)

    def all_to_all_rows(self, rows_SD: Tensor, sends: list[int], receives: list[int], phase: str) -> Pending[Tensor]:
        size = rows_SD.element_size() * rows_SD.shape[1:].numel()
        sent_WW = self.sent.setdefault(phase.split()[0], np.zeros((4, 4), dtype=np.int64))
        for peer, count in zip(self.inner.members, sends, strict=True):
            sent_WW[self.inner.members[self.inner.rank], peer] += count * size
        return self.inner.all_to_all_rows(rows_SD, sends, receives, phase)


@pytest.mark.parametrize("hidden", [16, 2048], ids=["rows too small to send once", "rows sent once a rank"])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("hierarchy", ["flat", "node"])
def test_bytes_are_those_that_the_dispatchers_send(hierarchy: str, wire: str, hidden: int) -> None:
    tokens, experts, top_k = 96, 16, 6
    ids_WTK = np.random.default_rng(hidden).integers(-1, experts, (4, tokens, top_k)).astype(np.int32)

    def on(transport: Transport) -> dict[str, np.ndarray]:
        recording = Recording(transport)
        codec = Fp8Wire(hidden) if wire == "fp8" else None
        form = make_dispatcher(recording, experts, hidden, torch.bfloat16, hierarchy=hierarchy, codec=codec)  # type: ignore[arg-type]
        with torch.no_grad():
            weights_TK = torch.ones(tokens, top_k)
            plan = form.plan(torch.from_numpy(ids_WTK[transport.rank]).long(), weights_TK)
            inbound = form.dispatch(torch.ones(tokens, hidden, dtype=torch.bfloat16), plan)
            form.combine(inbound.decoded().in_order().rows_RD, weights_TK, inbound)
        return recording.sent

    each = LocalWorld(4, topology=Topology((0, 0, 1, 1))).run(on)
    phases = {phase for sent in each for phase in sent}
    sent = {phase: sum(found.get(phase, np.zeros((4, 4), dtype=np.int64)) for found in each) for phase in phases}
    sent.setdefault("plan", np.zeros((4, 4), dtype=np.int64))

    traffic = counted(ids_WTK, Slots.contiguous(experts, 4), 2)
    kind = FlatStages if hierarchy == "flat" else NodeStages
    form = kind(Costs(PAIRS, LayerShape(hidden, 8, experts, top_k)), traffic, wire == "fp8")
    stages = [
        *form.choose(),
        *slots_together([form]),
        *index_together([form]),
        *form.send(),
        *form.place(),
        *form.pass_on(),
        *form.give_back(),
        *form.pass_back(),
        *form.finish(),
    ]
    assert set(sent) == {"plan", "dispatch", "combine"}
    for phase, sent_WW in sent.items():
        loads = [stage.load for stage in stages if stage.phase == phase and stage.load is not None]
        for rank in range(4):
            near, far = (rank ^ 1,), ((2, 3) if rank < 2 else (0, 1))
            assert sum(load.local_W[rank] for load in loads) == sent_WW[rank, rank], phase
            for direction, bytes_WW in enumerate((sent_WW, sent_WW.T)):
                assert sum(load.intra_2W[direction, rank] for load in loads) == bytes_WW[rank, near].sum(), phase
                assert sum(load.inter_2I[direction, rank] for load in loads) == bytes_WW[rank, far].sum(), phase


def test_a_thousand_ranks_are_counted_in_seconds() -> None:
    shape, began = LayerShape(8, 8, 256, 8), time.perf_counter()
    traffic = count_traffic(Drawn.skewed(shape).blocks(1024, 512), Slots.contiguous(256, 1024), 8, [0, 512])[0]
    assert traffic.flat_WW.sum() == 1024 * 512 * 8
    assert time.perf_counter() - began < 30
