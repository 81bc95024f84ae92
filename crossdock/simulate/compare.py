"""Schedules compared on one workload, from a few ranks to a thousand, and why the fastest wins."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from crossdock.errors import ConfigError
from crossdock.simulate.cluster import Cluster
from crossdock.simulate.predict import LATENCY, Prediction, predict
from crossdock.simulate.schedule import Schedule
from crossdock.simulate.shape import LayerShape
from crossdock.simulate.slots import Slots
from crossdock.simulate.traffic import count_chunks
from crossdock.simulate.workload import Routing, load_of

CALLED = {
    "inter": "links between nodes",
    "intra": "links inside nodes",
    "processor": "the processors",
    "host": "the hosts' planning",
    LATENCY: "latencies",
}


@dataclass(frozen=True)
class Choice:
    """What may be combined to schedules; `spare` slots a rank for replicas where placement is balanced."""

    hierarchies: tuple[str, ...] = ("flat", "node", "ring")
    wires: tuple[str, ...] = ("bf16", "fp8")
    chunks: tuple[int, ...] = (1, 2, 4)
    placements: tuple[str, ...] = ("contiguous",)
    spare: int = 1
    overlap: bool = True

    def schedules(self, placement: str, nodes: int, amid: bool = False) -> Iterator[Schedule]:
        """Those that differ from one another on so many nodes; `amid` too, where layers may choose that."""
        for hierarchy, wire, chunks in product(self.hierarchies, self.wires, self.chunks):
            if nodes == 1 and hierarchy in ("node", "ring") and "flat" in self.hierarchies:
                continue
            if hierarchy == "plain" and (wire != self.wires[0] or chunks != self.chunks[0]):
                continue
            if hierarchy == "plain":
                yield Schedule("plain", overlap=False, placement=placement)
            else:
                yield Schedule(hierarchy, wire, chunks, self.overlap, placement)
                if amid and (hierarchy, chunks, self.overlap) == ("node", 1, True):
                    yield Schedule(hierarchy, wire, chunks, self.overlap, placement, amid=True)


def compare(
    shape: LayerShape, cluster: Cluster, routing: Routing, tokens: int, ranks: Iterable[int], choice: Choice
) -> Iterator[list[Prediction]]:
    """For each number of ranks every schedule of `choice`, fastest first. Raises ConfigError for ranks or tokens that
    cannot be."""
    if tokens < 1:
        raise ConfigError(f"tokens must be at least 1, found {tokens}")
    for world in ranks:
        nodes = cluster.nodes(world)
        blocks = list(routing.blocks(world, tokens))
        found: list[Prediction] = []
        for placement in choice.placements:
            if placement == "balanced":
                load_E = load_of(blocks, shape.experts)
                slots = Slots.balanced(load_E, world, nodes, shape.num_groups, choice.spare)
            else:
                slots = Slots.contiguous(shape.experts, world)
            counted = count_chunks(blocks, slots, world // nodes, tokens, {*choice.chunks, 1})
            for schedule in choice.schedules(placement, nodes, nodes > 1 and not cluster.processor.host):
                found.append(predict(counted[schedule.chunks], shape, cluster, schedule))
        yield sorted(found, key=lambda prediction: prediction.total_s)


def explain(found: Sequence[Prediction]) -> list[str]:
    """Why the first, which is the fastest, beats the best of each other kind; a few sentences."""
    best = found[0]
    where = f"{best.ranks} ranks on {best.nodes} node{'s' if best.nodes > 1 else ''}"
    lines = [f"{where}: {best.schedule} takes {_time(best.total_s)} a layer. {_bound(best)}"]
    shares = sorted(best.critical.items(), key=lambda item: -item[1])[:3]
    chain = ", ".join(f"{name} {seconds / best.total_s:.0%}" for name, seconds in shares)
    lines.append(f"  Its longest chain is {chain}.{_hidden(best)}")
    for kind in _kinds(found):
        rival = next(other for other in found if kind(other))
        lines.append(f"  {rival.schedule} takes {rival.total_s / best.total_s:.2f} times as long: {_why(best, rival)}")
    return lines


def _kinds(found: Sequence[Prediction]) -> list["_Kind"]:
    """What differs from the best: another hierarchy, another wire, another placement, other chunks."""
    best = found[0].schedule
    kinds = [
        _Kind(name, value)
        for name in ("hierarchy", "wire", "placement", "chunks")
        for value in dict.fromkeys(getattr(other.schedule, name) for other in found)
        if value != getattr(best, name) and (name != "chunks" or value == 1)
    ]
    return [kind for kind in kinds if any(kind(other) for other in found)]


@dataclass(frozen=True)
class _Kind:
    name: str
    value: object

    def __call__(self, prediction: Prediction) -> bool:
        return bool(getattr(prediction.schedule, self.name) == self.value)


def _bound(prediction: Prediction) -> str:
    needed_s = prediction.needs_s[prediction.bound]
    share = needed_s / prediction.total_s if prediction.total_s else 0.0
    return f"It is bound by {CALLED[prediction.bound]}, busy for {_time(needed_s)} of it ({share:.0%})."


def _hidden(prediction: Prediction) -> str:
    return "" if prediction.hidden is None else f" {prediction.hidden:.0%} of the time on links is hidden."


def _why(best: Prediction, rival: Prediction) -> str:
    """The need that grew most."""
    grown_s = {name: rival.needs_s[name] - best.needs_s[name] for name in best.needs_s}
    name = max(grown_s, key=lambda name: grown_s[name])
    if grown_s[name] <= 0.02 * best.total_s:
        now, then = (f"{one.hidden or 0.0:.0%}" for one in (best, rival))
        return (
            f"it needs hardly more, but hides {then} of its travel instead of {now}." if now != then else "it is alike."
        )
    verb = "is" if name == "host" else "are"
    text = f"{CALLED[name]} {verb} needed for {_time(rival.needs_s[name])} instead of {_time(best.needs_s[name])}"
    if name in ("inter", "intra"):
        carried = f"{rival.bytes[name].max / 1e6:.1f} MB instead of {best.bytes[name].max / 1e6:.1f} MB"
        text += f" (the busiest carries {carried})"
    return f"{text}."


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
