"""One trial of the soak: starts its ranks, sends them what comes from outside, ends what hangs, and judges.

A rank that fails is to blame from the moment it says so, or is sent a signal. The other ranks' errors are held against
that: class, names, time. A victim that lives on (stopped and continued, late) must end as well.
"""

import json
import os
import random
import re
import select
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak_rank import PASSING, Trial
from benchmarks.soak_start import Event, Forked, UnderMpiexec

GRACE_S = 3.5  # 2 s in which a rank may say where it stands, and a busy machine
HANG_S = 20.0  # beyond the timeouts, from the start of a trial or of a recovery
EITHER = ("RankFailure", "CommTimeout")  # before it has come, or after
EXPECTED: dict[str, tuple[str, ...]] = {
    "killed": ("RankFailure",),
    "killed in recovery": ("RankFailure",),
    "killed at start": EITHER,
    "stopped at start": EITHER,
    "stopped": ("RankFailure",),
    "late": ("CommTimeout",),
    "error": ("RankFailure",),
    "abort": ("RankFailure",),
    "leaves": ("RankFailure",),
    "bad id": ("RankFailure",),
    "other width": ("PlanMismatch",),
    "other world": ("ConfigError",),
    "other nodes": ("ConfigError",),
    "never comes": ("CommTimeout",),
}
WAITED_FOR = ("stopped", "late", "killed at start", "stopped at start")  # nobody is told of these
LIVING = ("late", "abort")  # victims of these take part in a recovery
AT_START_S = 0.15  # about how long ranks take to become a group


@dataclass
class Outcome:
    """What came of a trial: problems (none where all is well), and how long after the fault each rank raised."""

    trial: Trial
    problems: list[str] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)
    hang: bool = False
    went_on: bool = False
    events: list[Event] = field(default_factory=list)

    @classmethod
    def heard(cls, told: dict[str, Any]) -> "Outcome":
        trial = told.pop("trial")
        return cls(Trial(**trial | {"victims": tuple(trial["victims"])}), **told)


def run_trial(trial: Trial) -> Outcome:
    """Runs it, in this process's children, and judges it."""
    running = _Running(trial)
    running.run()
    return judge(trial, running.events, running.faults, running.hung, running.began)


class _Running:
    """The ranks of a trial, and what is sent to them from outside."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.dice = trial, random.Random(trial.number)
        self.began = time.monotonic()
        self.events: list[Event] = []
        self.faults: dict[int, float] = {}  # by rank: when it failed
        self.hung: list[int] = []
        self.todo: list[tuple[float, int, int]] = []  # (when, rank, signal)
        self.sent: set[str] = set()
        self.pending = b""
        self.ranks = (UnderMpiexec if trial.transport == "mpi" else Forked)(trial)

    @property
    def alive(self) -> dict[int, int]:
        """Process ids by rank."""
        return self.ranks.alive

    def run(self) -> None:
        deadline = self.began + 3 * self.trial.timeout_s + HANG_S + self.trial.delay_s
        if self.trial.fault.endswith("at start"):
            self._once("first", self.trial.victims)
        while self.alive and time.monotonic() < deadline:
            self._listen(0.01)
            self.ranks.reap(self.events)
            self._act()
        while self._listen(0.0):  # what ranks said just before they ended
            pass
        self.hung = sorted(self.alive)
        self.ranks.close()

    def _listen(self, wait_s: float) -> bool:
        """Whether there was something to hear."""
        if not select.select([self.ranks.events], [], [], wait_s)[0]:
            return False
        chunk = os.read(self.ranks.events, 65536)
        *lines, self.pending = (self.pending + chunk).split(b"\n")
        for line in lines:
            self._note(json.loads(line))
        return bool(chunk)

    def _note(self, event: Event) -> None:
        self.events.append(event)
        trial = self.trial
        if event["event"] == "fault":
            self.faults.setdefault(event["rank"], event["at"])
            if trial.fault == "stopped briefly":
                self._later(trial.delay_s, event["rank"], signal.SIGCONT)
        ready = sum(one["event"] == "ready" for one in self.events)
        if ready == trial.world_size and trial.point == "any moment":
            self._once("first", trial.victims[:1] if trial.fault == "killed in recovery" else trial.victims)
        if event["event"] == "error" and trial.fault == "killed in recovery":
            self._once("second", trial.victims[1:])

    def _once(self, what: str, victims: tuple[int, ...]) -> None:
        """Sends each a signal at a random moment soon."""
        if what in self.sent:
            return
        self.sent.add(what)
        number = signal.SIGSTOP if self.trial.fault.startswith("stopped") else signal.SIGKILL
        for rank in victims:
            wait_s = self.dice.uniform(0.0, AT_START_S if self.trial.fault.endswith("at start") else 0.05)
            self._later(wait_s, rank, number)
            if self.trial.fault == "stopped briefly":
                self._later(wait_s + self.trial.delay_s, rank, signal.SIGCONT)

    def _later(self, wait_s: float, rank: int, number: int) -> None:
        self.todo.append((time.monotonic() + wait_s, rank, number))

    def _act(self) -> None:
        now = time.monotonic()
        for when, rank, number in [one for one in self.todo if one[0] <= now]:
            self.todo.remove((when, rank, number))
            if rank in self.alive:
                os.kill(self.alive[rank], number)
                if number != signal.SIGCONT:
                    self.faults.setdefault(rank, time.monotonic())
        over = self.trial.fault != "stopped briefly" or any(one["event"] == "done" for one in self.events)
        if (
            self.trial.fault.startswith("stopped")
            and over
            and self.alive.keys() <= self.faults.keys()
            and not self.todo
        ):
            for pid in self.alive.values():  # only those stopped are left
                os.kill(pid, signal.SIGCONT)


def judge(trial: Trial, events: list[Event], faults: dict[int, float], hung: list[int], began: float) -> Outcome:
    """Holds what the ranks said against what they should."""
    outcome = Outcome(trial, hang=bool(hung), events=events)
    say = outcome.problems.append
    if hung:
        say(f"ranks {hung} did not end")
    for event in events:
        if event["event"] in ("wrong", "broken"):
            say(f"rank {event['rank']}: {event['message']}")
    said = {what: {e["rank"]: e for e in events if e["event"] == what} for what in ("error", "done", "ready")}
    if trial.fault in PASSING:
        for rank in range(trial.world_size):
            if rank not in said["done"]:
                say(f"rank {rank} did not get over it: {said['error'].get(rank, {}).get('message', 'no word')}")
        return outcome
    at_start = trial.point == "start"
    to_blame = dict.fromkeys(trial.victims, began) if at_start else faults
    if not to_blame:
        say("the fault did not happen")
        return outcome
    for rank in sorted(set(range(trial.world_size)) - to_blame.keys()):
        if rank not in said["error"]:
            say(f"rank {rank} raised nothing")
        else:
            _judge_error(outcome, said["error"][rank], to_blame)
    if trial.fault in ("stopped", "stopped at start", "late", "abort", "other width", "other world", "other nodes"):
        for rank in sorted(to_blame.keys() - said["error"].keys()):
            say(f"rank {rank}, to blame and alive, raised nothing")
    if trial.recover:
        _judge_recovery(outcome, to_blame.keys(), events)
    return outcome


def _judge_error(outcome: Outcome, event: Event, to_blame: dict[int, float]) -> None:
    trial, rank, message = outcome.trial, event["rank"], event["message"]
    say = outcome.problems.append
    if event["kind"] not in (expected := EXPECTED[trial.fault]):
        say(f"rank {rank} raised {event['kind']}, expected {' or '.join(expected)}: {message}")
    text = re.sub(r"\(found by rank \d+\)", "", message.removeprefix(f"rank {rank}: "))
    named = set(map(int, re.findall(r"\brank (\d+)", text)))
    if trial.fault in ("other world", "other nodes"):  # names one of each view
        named &= to_blame.keys()
    if not named or not named <= to_blame.keys():
        say(f"rank {rank} names {sorted(named)}, expected of {sorted(to_blame)}: {message}")
    delay = event["at"] - min(to_blame.values())
    outcome.delays_s.append(delay)
    if delay > GRACE_S + (trial.timeout_s if trial.fault in WAITED_FOR or trial.point == "start" else 0.0):
        say(f"rank {rank} raised after {delay:.1f} s")


def _judge_recovery(outcome: Outcome, to_blame: Any, events: list[Event]) -> None:
    """Who was left went on together, or says why not: experts lost with two ranks, or one more killed."""
    trial, say = outcome.trial, outcome.problems.append
    left = [r for r in range(trial.world_size) if r not in to_blame or trial.fault in LIVING]
    went = {e["rank"]: e["members"] for e in events if e["event"] == "went on"}
    not_recovered = {e["rank"]: e for e in events if e["event"] == "not recovered"}
    outcome.went_on = bool(went)
    for rank in left:
        if rank in went:
            if went[rank] != left:
                say(f"rank {rank} went on with {went[rank]}, expected {left}")
        elif trial.fault == "killed in recovery" and rank in not_recovered:
            names = set(map(int, re.findall(r": rank (\d+)", not_recovered[rank]["message"])))
            if not names or not names <= set(to_blame):
                say(f"rank {rank} names {sorted(names)} after recovery: {not_recovered[rank]['message']}")
        else:
            say(f"rank {rank} did not go on: {not_recovered.get(rank, {}).get('message', 'no word')}")
    for rank in set(to_blame) - set(left):
        if trial.fault == "stopped" and rank not in not_recovered:
            say(f"rank {rank}, left behind, was not told")
