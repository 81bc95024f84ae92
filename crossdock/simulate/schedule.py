"""`Schedule`, and the jobs it is made of: stages of several chunks in the order in which `crossdock.moe.pipeline` runs.

    flat    a row for each (token, k) straight to its rank, or for each (token, rank) where that saves much
    node    a row for each (token, other node), over rails; then, and for a node's own tokens, flat inside the node;
            results are summed where they came in, and one row a (token, node) goes home
    ring    as node, but rows pass from each node to the next up to the farthest that needs them, and sums accumulate
            on their way back: one row a token on each link of its way
    plain   flat, a row for each (token, k), bfloat16, nothing asynchronous: all_to_all_single, a peer to compare with

Two chunks are under way, or all of them over rails; while one computes, the next one arrives. Without overlap each job
waits for the one before it. `amid`: one chunk over nodes, whose rows from other nodes are computed amid the node's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from crossdock.errors import ConfigError
from crossdock.simulate.cluster import Cluster
from crossdock.simulate.cost import COMPUTE, Costs, Load, Stage
from crossdock.simulate.shape import LayerShape
from crossdock.simulate.stages import FlatStages, NodeStages, index_together, slots_together
from crossdock.simulate.timeline import Job
from crossdock.simulate.traffic import Traffic

HIERARCHIES = ("flat", "node", "ring", "plain")
WIRES = ("bf16", "fp8")
PLACEMENTS = ("contiguous", "balanced")
CUTS = (0.25, 0.35, 0.5)  # where own rows are divided that others are computed amid, as in `comm.legs`


@dataclass(frozen=True)
class Schedule:
    """How a layer's rows travel: `chunks` parts of the tokens; with `overlap` one travels while another computes."""

    hierarchy: str = "flat"
    wire: str = "bf16"
    chunks: int = 1
    overlap: bool = True
    placement: str = "contiguous"
    amid: bool = False

    def __post_init__(self) -> None:
        for name, among in (("hierarchy", HIERARCHIES), ("wire", WIRES), ("placement", PLACEMENTS)):
            value = getattr(self, name)
            if value not in among:
                raise ConfigError(f"{name} must be one of {', '.join(among)}, found {value!r}")
        if self.chunks < 1:
            raise ConfigError(f"chunks must be at least 1, found {self.chunks}")
        if self.hierarchy == "plain" and (self.wire, self.chunks) != ("bf16", 1):
            raise ConfigError("hierarchy 'plain' is bfloat16 in one chunk")
        if self.amid and (self.hierarchy, self.chunks) != ("node", 1):
            raise ConfigError("rows are computed amid others in one chunk of hierarchy 'node'")

    def __str__(self) -> str:
        parts = [f"{self.hierarchy} {self.wire}"]
        parts += [f"{self.chunks} chunks"] if self.chunks > 1 else []
        parts += ["amid"] if self.amid else []
        parts += [] if self.overlap else ["in turn"]
        parts += [self.placement] if self.placement != "contiguous" else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Program:
    """The jobs of one layer, and the load of each that moves rows, in the same order (None elsewhere)."""

    jobs: tuple[Job, ...]
    loads: tuple[Load | None, ...]


def program(
    chunks: Sequence[Traffic], shape: LayerShape, cluster: Cluster, schedule: Schedule, experts: bool = True
) -> Program:
    """What runs for a layer whose tokens are in `chunks`; without `experts`, the exchange alone."""
    costs = Costs(cluster, shape)
    fp8 = schedule.wire == "fp8"
    forms: list[FlatStages | NodeStages] = []
    for traffic in chunks:
        if schedule.hierarchy in ("flat", "plain") or traffic.nodes == 1:
            forms.append(FlatStages(costs, traffic, fp8, schedule.hierarchy == "plain"))
        else:
            forms.append(NodeStages(costs, traffic, fp8, schedule.hierarchy == "ring"))
    writer = _Writer(schedule.overlap and schedule.hierarchy != "plain")
    _write(writer, forms, experts and bool(shape.shared), experts, schedule.amid)
    return Program(tuple(writer.jobs), tuple(writer.loads))


def _write(
    writer: "_Writer", forms: Sequence[FlatStages | NodeStages], shared: bool, experts: bool, amid: bool
) -> None:
    """The order of `moe.pipeline.Flow`."""
    last = len(forms) - 1
    in_legs = isinstance(forms[0], NodeStages)
    _write_plans(writer, forms)
    for chunk, form in enumerate(forms[: None if in_legs else 2]):
        writer.work(chunk, form.send())
    if shared:
        for chunk, form in enumerate(forms):
            writer.work(chunk, [form.costs.shared(form.traffic)])
    for chunk, form in enumerate(forms):
        if not in_legs and 0 < chunk < last:
            writer.work(chunk + 1, forms[chunk + 1].send())
        if (last or amid) and not chunk and isinstance(form, NodeStages) and experts:
            _write_portions(writer, form, amid)
            continue
        writer.go_on(chunk, "place", form.place())
        if chunk < 2:  # later chunks have been passed on below
            writer.go_on(chunk, "pass_on", form.pass_on())
        writer.go_on(chunk, "arrive", form.arrive())
        if 0 < chunk < last:
            writer.go_on(chunk + 1, "pass_on", forms[chunk + 1].pass_on())
        if experts:
            writer.work(chunk, form.products())
        writer.work(chunk, form.give_back())
        if chunk:
            writer.go_on(chunk - 1, "pass_back", forms[chunk - 1].pass_back())
    if writer.awaits(last, "pass_back"):
        writer.go_on(last, "pass_back", forms[last].pass_back())
    for chunk, form in enumerate(forms):
        writer.go_on(chunk, "finish", form.finish())


def _write_plans(writer: "_Writer", forms: Sequence[FlatStages | NodeStages]) -> None:
    """The order of `plans` of comm's dispatchers: one gather and one exchange of each kind for all chunks."""
    for chunk, form in enumerate(forms):
        writer.work(chunk, form.choose())
    writer.work(0, [forms[0].costs.gathering(forms[0].traffic)])
    for chunk, form in enumerate(forms):
        writer.work(chunk, form.plan())
    writer.work(0, slots_together(forms))
    for chunk, form in enumerate(forms):
        writer.work(chunk, form.plan_own())
    writer.wait(0, "plan_far")
    for chunk, form in enumerate(forms):
        writer.work(chunk, form.plan_far())
    writer.work(0, index_together(forms))
    writer.wait(0, "send")


def _write_portions(writer: "_Writer", form: NodeStages, amid: bool) -> None:
    """The first chunk: its node's own rows are computed while the others are under way, or some also after them."""
    first, second, third, fourth = (end - begin for begin, end in pairwise([0.0, *CUTS, 1.0]))
    writer.go_on(0, "place", form.place())
    writer.work(0, form.products_of_own(first if amid else 1.0))
    if not amid:
        writer.work(0, form.give_back_own())
    writer.go_on(0, "pass_on", form.pass_on())
    if amid:
        writer.work(0, form.products_of_own(second))
    writer.go_on(0, "arrive", form.arrive())
    writer.work(0, form.products_of_far())
    writer.work(0, form.give_back_far())
    if amid:
        writer.work(0, form.products_of_own(third))
        writer.go_on(0, "pass_back", form.pass_back())
        writer.work(0, form.products_of_own(fourth))
        writer.work(0, form.give_back_own())


class _Writer:
    """Writes stages down as jobs. The host's own work is in one lane and keeps its order. An exchange starts behind the
    work that was written before it, and the step that needs what it brings waits for it."""

    def __init__(self, overlap: bool) -> None:
        self.overlap = overlap
        self.jobs: list[Job] = []
        self.loads: list[Load | None] = []
        self._behind: list[int] = []
        self._flying: dict[tuple[int, str], list[int]] = {}

    def work(self, chunk: int, stages: Sequence[Stage]) -> None:
        """Stages that wait for no exchange."""
        for stage in stages:
            self._add(chunk, stage)

    def wait(self, chunk: int, step: str) -> None:
        """For this chunk's exchanges that bring what the step needs."""
        self._behind = [*self._behind, *self._flying.pop((chunk, step), [])]

    def awaits(self, chunk: int, step: str) -> bool:
        """Whether an exchange brings what the step needs, and has not been waited for."""
        return (chunk, step) in self._flying

    def go_on(self, chunk: int, step: str, stages: Sequence[Stage]) -> None:
        """Waits, where there is something to do then."""
        if stages:
            self.wait(chunk, step)
            self.work(chunk, stages)

    def _add(self, chunk: int, stage: Stage) -> None:
        number = len(self.jobs)
        after = self._behind if self.overlap else [number - 1] if number else []
        self.jobs.append(Job(stage.name, stage.lane, stage.needs, stage.delay, tuple(after), stage.phase, chunk))
        self.loads.append(stage.load)
        if stage.lane == COMPUTE:
            self._behind = [number]
        else:
            self._flying.setdefault((chunk, stage.until), []).append(number)
