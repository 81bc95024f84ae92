"""One rank of a soak trial: exchanges, forward and backward, that can be checked to the bit, and a fault in the midst.

Values are small integers and powers of two, so every sum is exact in any order: the flat and the hierarchical form, and
the ranks that are left after a failure, must all give the very same.

Legend: T tokens, K experts per token, D hidden, E logical experts.
"""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.comm import Transport, make_dispatcher, make_transport
from crossdock.errors import CrossdockError
from crossdock.parallel import EPGroup, ExpertPlacement, Topology, init, lost_ranks, recover

HIDDEN, TOP_K, SLOTS = 8, 3, 4
STEPS = 12  # of a trial in which nothing ends the exchange
AFTER = 3  # steps after a recovery
PAUSE_S = 0.002
PASSING = ("stopped briefly", "late a little")  # faults that the exchange must get over
POINTS = ("plan", "dispatch", "under way", "experts", "combine", "backward", "in backward", "pause")


@dataclass(frozen=True)
class Trial:
    """What happens in one trial; `victims` do it, at `point` of exchange `step`, or whenever a signal comes (-1)."""

    number: int
    transport: str
    world_size: int
    hierarchy: str
    fault: str
    victims: tuple[int, ...]
    point: str
    step: int
    delay_s: float
    recover: bool
    timeout_s: float

    @property
    def endless(self) -> bool:
        """Whether ranks exchange until something ends it."""
        return self.fault not in PASSING


class Reporter:
    """Lines of JSON to the process that judges the trial."""

    def __init__(self, rank: int, pipe: int) -> None:
        self.rank, self.pipe = rank, pipe

    def __call__(self, event: str, **what: object) -> None:
        line = {"rank": self.rank, "event": event, "at": time.monotonic(), "pid": os.getpid()} | what
        os.write(self.pipe, json.dumps(line).encode() + b"\n")


def placement_of(world_size: int) -> ExpertPlacement:
    """Half as many experts as slots, each on one rank and on the next."""
    experts = world_size * SLOTS // 2
    firsts = list(range(experts))
    again = firsts[-(SLOTS // 2) :] + firsts[: -(SLOTS // 2)]
    slots = []
    for rank in range(world_size):
        mine = slice(rank * SLOTS // 2, (rank + 1) * SLOTS // 2)
        slots += firsts[mine] + again[mine]
    return ExpertPlacement(experts, world_size, tuple(slots))


class Exchanges:
    """One layer's exchange over `transport`, again and again; `member` is this rank's number as the world started."""

    def __init__(self, trial: Trial, transport: Transport, placement: ExpertPlacement, member: int) -> None:
        self.transport, self.placement, self.member = transport, placement, member
        odd = trial.fault == "other width" and member in trial.victims
        self.hidden = HIDDEN + 1 if odd else HIDDEN
        # nodes are unequal once a rank is gone, and the exchange over nodes wants them equal
        hierarchy = trial.hierarchy if transport.world_size == trial.world_size else "flat"
        self.form = make_dispatcher(transport, placement.num_slots, self.hidden, torch.float32, "torch",
                                    hierarchy=hierarchy)  # fmt: skip

    def step(self, number: int, fault: "Fault") -> None:
        """One exchange, forward and backward; raises AssertionError where a value is not the one expected."""
        x_TD, ids_TK, weights_TK = self._inputs(number)
        x_TD.requires_grad_()
        weights_TK.requires_grad_()
        fault.at("plan", number)
        slots_TK = fault.spoiled(self.placement.slot_ids(ids_TK), number)
        plan = self.form.plan(slots_TK, weights_TK)
        fault.at("dispatch", number)
        arriving = self.form.dispatch_async(x_TD, plan)
        fault.at("under way", number)
        inbound = arriving.wait().in_order()
        fault.at("experts", number)
        scale_R1 = torch.repeat_interleave(self._scales(), _lengths(inbound.ends_L))[:, None]
        rows_RD = inbound.rows_RD
        if rows_RD.requires_grad:
            rows_RD.register_hook(lambda _: fault.at("in backward", number))
        y_TD = self.form.combine(rows_RD * scale_R1, weights_TK, inbound)
        fault.at("combine", number)
        want_TD, dx_TD = self._expected(x_TD.detach(), ids_TK, weights_TK.detach())
        assert torch.equal(y_TD, want_TD), "combine gave other values"
        fault.at("backward", number)
        y_TD.sum().backward()
        assert x_TD.grad is not None and torch.equal(x_TD.grad, dx_TD), "backward gave other values"
        fault.at("pause", number)
        time.sleep(PAUSE_S)

    def _inputs(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(1000 * self.member + number)
        tokens = int(torch.randint(0, 7, (1,), generator=random))
        x_TD = torch.randint(-8, 9, (tokens, self.hidden), generator=random).float()
        ids_TK = torch.randint(-1, self.placement.num_experts, (tokens, TOP_K), generator=random)
        return x_TD, ids_TK, 2.0 ** torch.randint(-2, 2, (tokens, TOP_K), generator=random)

    def _scales(self) -> Tensor:
        return torch.tensor([_scale(expert) for expert in self.placement.experts_of_rank(self.transport.rank)])

    def _expected(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        factor_T = torch.zeros(len(x_TD), 1)
        for t in range(len(x_TD)):
            for k in range(TOP_K):
                if ids_TK[t, k] >= 0:
                    factor_T[t] += weights_TK[t, k] * _scale(int(ids_TK[t, k]))
        return x_TD * factor_T, factor_T.expand(-1, self.hidden)


def _scale(expert: int) -> float:
    return 2.0 ** (expert % 5 - 2)


def _lengths(ends_L: Tensor) -> Tensor:
    return torch.diff(ends_L.long(), prepend=torch.zeros(1, dtype=torch.int64))


class Fault:
    """What this rank is to do, and when; nothing on a rank that is no victim."""

    def __init__(self, trial: Trial, rank: int, group: EPGroup, transport: Transport, report: Reporter) -> None:
        self.trial, self.group, self.transport, self.report = trial, group, transport, report
        self.armed = rank in trial.victims

    def spoiled(self, ids_TK: Tensor, step: int) -> Tensor:
        if self.armed and self.trial.fault == "bad id" and step == self.trial.step:
            self.report("fault")
            return torch.full((1, TOP_K), 10**6)
        return ids_TK

    def at(self, point: str, step: int) -> None:
        trial = self.trial
        if not self.armed or (step, point) != (trial.step, trial.point):
            return
        self.report("fault")
        match trial.fault:
            case "killed" if trial.transport == "mpi":
                os._exit(1)  # after a signal mpiexec ends all ranks
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stopped" | "stopped briefly":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "late" | "late a little":
                time.sleep(trial.delay_s)
            case "error":
                raise ValueError("broken on purpose")
            case "abort":
                self.transport.abort("told to")
            case "leaves":
                self.group.close()
                raise SystemExit


def live(trial: Trial, rank: int, port: int, report: Reporter) -> None:
    """All of a rank's part in a trial; returns when the process could end."""
    if trial.fault == "never comes" and rank in trial.victims:
        return
    odd = trial.fault == "other world" and rank in trial.victims
    if trial.transport != "mpi":  # which tells its ranks itself
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(trial.world_size + odd), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    nodes = [r * 2 // trial.world_size for r in range(trial.world_size)]
    if trial.fault == "other nodes" and rank in trial.victims:
        nodes[-1] = 0
    told = trial.hierarchy == "node" or trial.fault == "other nodes"
    try:
        group = init("cpu", trial.timeout_s, Topology(tuple(nodes)) if told and not odd else None)
    except CrossdockError as error:
        return report("error", kind=type(error).__name__, message=str(error), steps=0)
    try:
        with group:
            _exchange(trial, rank, group, report)
    except (CrossdockError, ValueError):
        pass  # told, or what the others must hear of
    except SystemExit:
        report("left")
    except AssertionError as error:
        report("wrong", message=str(error))


def _exchange(trial: Trial, rank: int, group: EPGroup, report: Reporter) -> None:
    step = 0
    try:
        transport = make_transport(group, trial.transport)
        work = Exchanges(trial, transport, placement_of(trial.world_size), rank)
        fault = Fault(trial, rank, group, transport, report)
        while step < STEPS or trial.endless:
            work.step(step, fault)
            step += 1
            if step == 2:
                report("ready")
    except CrossdockError as error:
        report("error", kind=type(error).__name__, message=str(error), steps=step)
        if not trial.recover:
            raise
        _go_on(trial, rank, group, report)
        return
    report("done", steps=step)


def _go_on(trial: Trial, rank: int, group: EPGroup, report: Reporter) -> None:
    try:
        with recover(group) as survivors:
            placement = placement_of(trial.world_size).without(lost_ranks(group, survivors))
            same = survivors.world_size > 1 and trial.transport != "mpi"  # MPI has no smaller world
            transport = make_transport(survivors, trial.transport if same else "auto")
            work = Exchanges(trial, transport, placement, rank)
            for step in range(AFTER):
                work.step(step, Fault(trial, -1, survivors, transport, report))
            report("went on", members=survivors.members)
    except CrossdockError as error:
        report("not recovered", kind=type(error).__name__, message=str(error))


def wait_for_threads() -> None:
    """What the interpreter would wait for at its end."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
