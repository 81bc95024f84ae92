"""Measurements read and predictions set beside them: the same rows, each form, and files that are something else."""

from itertools import product
from typing import Any

import pytest

from crossdock.errors import ConfigError
from crossdock.simulate import (
    PRESETS,
    LayerShape,
    Schedule,
    Slots,
    count_chunks,
    predict,
    rank_choices,
)
from crossdock.simulate.check import FORMS, check, median_error

PAIRS = PRESETS["h100-400g"].changed({"ranks_per_node": 2})
HIDDEN, TOKENS, EXPERT = 512, 32, 64


def expected_us(hierarchy: str, wire: str, layer: bool, chunks: int = 1) -> tuple[float, int]:
    """(microseconds, bytes of rows between nodes) of the skewed case on two nodes of two."""
    ids = [rank_choices("skewed", rank, TOKENS, 64, 8)[None].astype("int32") for rank in range(4)]
    parts = count_chunks(ids, Slots.contiguous(64, 4), 2, TOKENS, (1, chunks))
    schedule = Schedule(hierarchy, wire, chunks, hierarchy != "plain")
    found = predict(parts[chunks], LayerShape(HIDDEN, EXPERT, 64, 8), PAIRS, schedule, layer)
    return found.total_s * 1e6, 2 * int(parts[1][0].rail_WW.sum()) * 2 * HIDDEN


def result(**changes: Any) -> dict[str, Any]:
    """What the benchmark would print if every prediction were true to 10 percent."""
    times = {f"{form}{layer}": 1.1 * expected_us(own or "node", wire, bool(layer))[0]
             for (form, (own, wire)), layer in product(FORMS.items(), ("", " layer"))}  # fmt: skip
    case = {
        "case": "a case", "hidden": HIDDEN, "tokens_per_rank": TOKENS, "routing": "skewed", "hidden_fraction": 0.5,
        "chunks": {"bf16 layer": 1, "fp8 layer": 1},
        "times_us": times | {"experts": 1.0}, "internode_bytes": expected_us("node", "bf16", False)[1],
    }  # fmt: skip
    return {"world": "2x2", "expert_size": EXPERT, "num_experts": 64, "top_k": 8, "cases": [case | changes]}


def test_each_time_has_its_prediction() -> None:
    checked = check(result(), PAIRS)
    assert [one.form for one in checked] == ["plain", "plain layer", "bf16", "bf16 layer", "fp8", "fp8 layer"]
    for one in checked:
        assert one.hidden == (0.5 if one.form == "bf16 layer" else None)
        assert one.error == pytest.approx(1 / 1.1 - 1) and one.same_rows is True and one.case == "a case"
    assert median_error(checked) == pytest.approx(1 - 1 / 1.1)
    hierarchies = {one.form.split()[0]: one.predicted.schedule.hierarchy for one in checked}
    assert hierarchies == {"plain": "plain", "bf16": "node", "fp8": "node"}


def test_other_rows_are_seen() -> None:
    assert {one.same_rows for one in check(result(internode_bytes=1), PAIRS)} == {False}
    assert {one.same_rows for one in check(result(routing="random"), PAIRS)} == {False}
    assert {one.same_rows for one in check(result(internode_bytes=None), PAIRS)} == {None}


def test_chunks_are_those_told() -> None:
    chunks, portions = {"bf16 layer": 4, "fp8 layer": 3}, {"bf16 layer": 2, "fp8 layer": 1}
    told = {one.form: one for one in check(result(chunks=chunks, portions=portions), PAIRS)}
    assert not any(one.predicted.schedule.amid for one in told.values())
    amid = check(result(portions={"bf16 layer": 1, "fp8 layer": 5}), PAIRS)
    assert [one.form for one in amid if one.predicted.schedule.amid] == ["fp8 layer"]
    taken = {name: one.predicted.schedule.chunks for name, one in told.items()}
    assert taken == {"plain": 1, "plain layer": 1, "bf16": 1, "bf16 layer": 4, "fp8": 1, "fp8 layer": 3}
    assert told["bf16 layer"].predicted.total_s * 1e6 == expected_us("node", "bf16", True, 4)[0]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"world": "two by two"}, "NODESxRANKS"),
        ({"cases": []}, "no cases"),
        ({"world": "1x4"}, "4 ranks a node"),
        ({"world": "2x4"}, "4 ranks a node"),
        ({"expert_size": None}, "expert_size"),
        ({"num_experts": None}, "num_experts"),
        ({"top_k": 8.0}, "top_k"),
        (result(chunks=None), "case 'a case' does not say how many chunks its layers took"),
        (result(chunks={"bf16 layer": 2}), "lacks 'fp8 layer'"),
        ({"cases": [{"hidden": 8}]}, "tokens_per_rank"),
        ({"cases": [{"hidden": 8, "tokens_per_rank": 4, "routing": "random"}]}, "times_us"),
        ({"cases": [{"hidden": 8, "tokens_per_rank": 4, "routing": "odd", "times_us": {}}]}, "routing"),
    ],
)
def test_files_that_are_something_else(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        check(result() | change, PAIRS)
