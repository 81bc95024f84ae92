"""Predictions held against measurements: the cases of `bench exchange --json`, each time beside what is expected.

The routing is drawn again as the benchmark drew it (`rank_choices`), so both count the same rows: the bytes of rows
that cross between nodes must be equal, to the byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from crossdock.errors import ConfigError
from crossdock.simulate.cluster import Cluster
from crossdock.simulate.predict import Prediction, predict
from crossdock.simulate.routing import rank_choices
from crossdock.simulate.schedule import Schedule
from crossdock.simulate.shape import LayerShape
from crossdock.simulate.slots import Slots
from crossdock.simulate.traffic import Traffic, count_chunks

HIDDEN = {"bf16": "hidden_fraction", "fp8": "hidden_fraction_fp8"}
LAYER = " layer"  # of a time's name: with the experts, not the exchange alone
FORMS = {"plain": ("plain", "bf16"), "bf16": ("", "bf16"), "fp8": ("", "fp8")}  # a time's name: hierarchy, wire


@dataclass(frozen=True)
class Checked:
    """One time of one case, in seconds. `error` is predicted / measured - 1.

    same_rows: whether rows that cross between nodes in our form are as many bytes as the benchmark counted; None where
    it did not. hidden: the part of a layer's travel that was hidden, where that was measured.
    """

    case: str
    form: str
    measured_s: float
    predicted: Prediction
    same_rows: bool | None
    hidden: float | None

    @property
    def error(self) -> float:
        return self.predicted.total_s / self.measured_s - 1.0


def check(result: Mapping[str, Any], cluster: Cluster) -> list[Checked]:
    """Every time of every case of a `bench exchange --json`. Raises ConfigError for another cluster or another file."""
    nodes, per_node = _world(result)
    if per_node != cluster.ranks_per_node:
        raise ConfigError(f"the measurement has {per_node} ranks a node, cluster {cluster.name!r} has "
                          f"{cluster.ranks_per_node}: calibrate on the same shape")  # fmt: skip
    cases = result.get("cases")
    if not isinstance(cases, list) or not cases:
        raise ConfigError("the measurement has no cases: give what `crossdock bench exchange --json` prints")
    return [one for case in cases for one in _check_case(case, result, nodes, per_node, cluster)]


def median_error(checked: Sequence[Checked]) -> float:
    """Of the errors without their signs."""
    return median(abs(one.error) for one in checked)


def _world(result: Mapping[str, Any]) -> tuple[int, int]:
    text = str(result.get("world", ""))
    nodes, _, ranks = text.partition("x")
    if not nodes.isdecimal() or not ranks.isdecimal() or not int(nodes) or not int(ranks):
        raise ConfigError(f"the measurement's world must be NODESxRANKS, found {text!r}")
    return int(nodes), int(ranks)


def _check_case(
    case: Mapping[str, Any], result: Mapping[str, Any], nodes: int, per_node: int, cluster: Cluster
) -> Iterator[Checked]:
    hidden, tokens = _integer(case, "hidden"), _integer(case, "tokens_per_rank")
    experts, top_k = _integer(result, "num_experts"), _integer(result, "top_k")
    shape = LayerShape(hidden, _integer(result, "expert_size"), experts, top_k)
    routing, times = str(case.get("routing")), case.get("times_us")
    if not isinstance(times, dict):
        raise ConfigError(f"case {case.get('case')!r} has no times_us")
    ranks = nodes * per_node
    blocks = [rank_choices(routing, rank, tokens, experts, top_k)[None].astype("int32") for rank in range(ranks)]
    taken = {name: _chunks(case, name) for name in times if _form(name) is not None}
    counted = count_chunks(blocks, Slots.contiguous(experts, ranks), per_node, tokens, {1, *taken.values()})
    same_rows = _same_rows(case, shape, counted[1][0])
    hierarchy = "node" if nodes > 1 else "flat"
    for name, chunks in taken.items():
        form, whole = name.split()[0], name.endswith(LAYER)
        own, wire = FORMS[form]
        schedule = Schedule(own or hierarchy, wire, chunks, not own, amid=_is_amid(case, name))
        predicted = predict(counted[chunks], shape, cluster, schedule, whole)
        was_hidden = case.get(HIDDEN[form]) if whole and form in HIDDEN else None
        yield Checked(str(case.get("case")), name, float(times[name]) * 1e-6, predicted, same_rows, was_hidden)


def _form(name: str) -> str | None:
    """Of a time that can be predicted, the key in FORMS."""
    form = name.removesuffix(LAYER)
    return form if form in FORMS else None


def _chunks(case: Mapping[str, Any], name: str) -> int:
    """How many chunks it took: a layer of ours as many as the benchmark says, all else one."""
    form = _form(name)
    if form == name or form == "plain":
        return 1
    told = case.get("chunks")
    if not isinstance(told, dict):
        raise ConfigError(f"case {case.get('case')!r} does not say how many chunks its layers took: {told!r}")
    return _integer(told, name)


def _is_amid(case: Mapping[str, Any], name: str) -> bool:
    """Whether a layer of ours came in the portions in which rows from other nodes are amid the node's own."""
    told = case.get("portions")
    return isinstance(told, dict) and told.get(name) == 5


def _same_rows(case: Mapping[str, Any], shape: LayerShape, traffic: Traffic) -> bool | None:
    told = case.get("internode_bytes")
    if told is None or traffic.nodes == 1:
        return None
    return bool(told == 2 * int(traffic.rail_WW.sum()) * shape.native_row)


def _integer(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(f"the measurement lacks {name!r}, or it is no positive integer: {value!r}")
    return value
