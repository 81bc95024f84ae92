"""`Watch`: what a group knows of its own failure, and `Channel`: waits that end when there is one.

A group fails once. The first error, whoever finds it, travels to all ranks over the wires; from then on every wait ends
and every further use raises it again, so that no rank goes on with half a group. Waits look for it, and for ranks that
are gone, every SLICE_S: an abort or a death ends them then, and not at the timeout.

    turn = channel.enter("dispatch of exchange 3")      # raises the group's first failure, if there was one
    channel.wait(turn, poll)                            # poll(seconds) waits that long and says whether it is done

A rank that is stopped or whose machine vanished closes nothing. Only the timeout finds it: no rank asks another while
all is well, and a rank that is merely slow is left alone until then.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

from crossdock.errors import CrossdockError
from crossdock.parallel.bounded import Background
from crossdock.parallel.standing import ANSWER_S, SETTLE_S, Failure, Place, Standing, Turn, Wait, blame
from crossdock.parallel.wires import Message, Wires

T = TypeVar("T")
LONGEST_WHY = 500  # characters of a reason that travel
SLICE_S = 0.05  # how often a wait looks whether there is still something to wait for
EARLY = 0.9  # share of the timeout before which an exchange that breaks did so for another reason
_open: "WeakSet[Watch]" = WeakSet()


class Watch:
    """The failure of one group, this rank's standing in it, and what others have told; `members` in world numbers."""

    def __init__(self, wires: Wires, members: tuple[int, ...], epoch: int = 0) -> None:
        self.wires, self.members, self.epoch = wires, members, epoch
        self.rank = wires.rank
        self.standing: Standing = {}
        self.failure: Failure | None = None
        self._hooks: list[Callable[[], None]] = []
        self.notes: dict[str, dict[int, Message]] = {}  # of each kind the last one, by sender
        self._asked = 0
        self._answers: dict[int, dict[int, Standing]] = {}  # to each question that is open: of a wait, in its thread
        wires.on_messages(epoch, self._handle)
        _open.add(self)

    def fail(self, failure: Failure) -> Failure:
        """Makes `failure` the group's, unless it has one; returns the one that is. Tells the others."""
        with self.wires.changed:
            if not self._set(failure):
                assert self.failure is not None
                return self.failure
            for rank in self.members:
                self.wires.send(rank, self.epoch, {"kind": "fail", "failure": failure.told()})
        return failure

    def abort(self, why: str) -> None:
        """Ends all waits of every rank: each raises RankFailure naming this rank and `why`. Waits for nobody."""
        text = " ".join(why.split())[:LONGEST_WHY]
        self.fail(Failure("abort", (self.rank,), f"rank {self.rank} gave up: {text}", self.rank))

    def when_failed(self, hook: Callable[[], None]) -> None:
        """Calls `hook`, in another thread, once the group has failed: now, where it has."""
        with self.wires.changed:
            self._hooks.append(hook)
            if self.failure is not None:
                self._run_hooks()

    def channel(self, name: str, members: tuple[int, ...], timeout_s: float) -> "Channel":
        """`name` is the same on all its members, and no other channel's."""
        place = self.standing[name] = Place(members)
        return Channel(self, name, place, timeout_s)

    def ask(self) -> dict[int, Standing | None]:
        """Where every rank that still is there stands; None for one that does not say so within ANSWER_S."""
        with self.wires.changed:
            self._asked += 1
            number, answers = self._asked, self._answers.setdefault(self._asked, {})
            asked = set(self.members) - self.wires.lost.keys() - {self.rank}
            for rank in asked:
                self.wires.send(rank, self.epoch, {"kind": "ask", "number": number})
            self.wires.changed.wait_for(lambda: asked <= answers.keys() | self.wires.lost.keys(), ANSWER_S)
            del self._answers[number]
            answered: dict[int, Standing | None] = {rank: answers.get(rank) for rank in asked - self.wires.lost.keys()}
        return answered | {self.rank: self.standing}

    def tell(self, kind: str, **what: Any) -> None:
        """Sends a note to all others; it replaces this rank's last one of that kind."""
        for rank in self.members:
            self.wires.send(rank, self.epoch, {"kind": kind} | what)

    def close(self) -> None:
        """Says goodbye to all; threads end."""
        _open.discard(self)
        self.wires.close(self.standing)

    def _set(self, failure: Failure) -> bool:
        if self.failure is not None:
            return False
        self.failure = failure
        self.wires.changed.notify_all()
        self._run_hooks()
        return True

    def _run_hooks(self) -> None:
        """Each once, in a thread that this rank's does not wait for: a hook may wait for those that now end."""
        for hook in self._hooks:
            threading.Thread(target=hook, name="crossdock failure").start()
        self._hooks.clear()

    def _handle(self, sender: int, message: Message) -> None:
        """In the reading thread, with `changed` held."""
        match message["kind"]:
            case "fail":
                self._set(Failure.heard(message["failure"]))
            case "ask":
                told = {name: place.told() for name, place in list(self.standing.items())}
                self.wires.send(sender, self.epoch, {"kind": "say", "number": message["number"], "standing": told})
            case "say":
                if message["number"] in self._answers:
                    heard = {name: Place.heard(place) for name, place in message["standing"].items()}
                    self._answers[message["number"]][sender] = heard
            case kind:
                self.notes.setdefault(kind, {})[sender] = message


@atexit.register
def say_goodbye() -> None:
    """Of a process that ends in good order without having closed its groups: others may still be in what it has done.

    The newest watch over the same wires first: it knows where the rank stands.
    """
    if getattr(sys, "last_value", None) is None:
        for watch in sorted(_open, key=lambda watch: -watch.epoch):
            watch.close()


os.register_at_fork(after_in_child=_open.clear)  # what a child closes its parent could no longer use


class Channel:
    """The collectives of one transport, counted in the order in which this rank enters them."""

    def __init__(self, watch: Watch, name: str, place: Place, timeout_s: float) -> None:
        self.watch, self.name, self.timeout_s = watch, name, timeout_s
        self._place = place
        self._others = set(place.members) - {watch.rank}

    def enter(self, phase: str) -> Turn:
        """The collective that begins. Raises the group's first failure, if there was one."""
        if self.watch.failure is not None:
            raise self.watch.failure.error(self.watch.rank, phase)
        return self._place.enter(phase)

    def wait(self, turn: Turn, poll: Callable[[float], bool]) -> None:
        """Returns when poll(seconds), which waits no longer than that, says that the collective is done.

        Raises RankFailure, CommTimeout or PlanMismatch, naming the ranks to blame, when it raises a RuntimeError, the
        group has failed, a rank is gone, or the timeout has passed since the collective began.
        """
        self._place.waiting = turn.number
        try:
            if not poll(SLICE_S):
                self._wait(turn, poll)
        except CrossdockError:
            raise
        except RuntimeError as error:
            raise self._explain(turn, error) from error
        finally:
            self._place.waiting = 0

    def run(self, phase: str, work: Callable[[], T]) -> T:
        """work() as a collective: in a thread of its own, which is left behind where the wait for it ends."""
        turn = self.enter(phase)
        running = Background(work, phase)

        def poll(seconds: float) -> bool:
            if not running.done(seconds):
                return False
            running.result()
            return True

        self.wait(turn, poll)
        return running.result()

    def _wait(self, turn: Turn, poll: Callable[[float], bool]) -> None:
        doomed = float("inf")
        while True:
            now = time.monotonic()
            if self.watch.failure is not None or now >= min(doomed, turn.began + self.timeout_s):
                raise self._explain(turn)
            if doomed == float("inf") and self._missed(turn):
                doomed = now + SETTLE_S
            if poll(SLICE_S):
                return

    def _missed(self, turn: Turn) -> bool:
        """Whether a rank is gone that may owe this collective something."""
        lost = self.watch.wires.lost
        return bool(lost) and any(r in lost and not lost[r].was_there(self.name, turn.number) for r in self._others)

    def _explain(self, turn: Turn, broke: RuntimeError | None = None) -> CrossdockError:
        """The group's failure, which is this one where there was none before; `broke` is what a library said."""
        watch, changed = self.watch, self.watch.wires.changed
        waited = time.monotonic() - turn.began
        with changed:
            if broke is not None:  # of a connection that broke some hear sooner than others
                changed.wait_for(lambda: watch.failure is not None or self._missed(turn), SETTLE_S)
            if self._missed(turn):  # two may have died together
                changed.wait_for(lambda: watch.failure is not None, SETTLE_S)
        if watch.failure is None:
            early = broke is not None and waited < EARLY * self.timeout_s
            said = next(iter(str(broke).splitlines()), type(broke).__name__) if early else ""
            wait = Wait(watch.rank, self.name, turn, waited, self.timeout_s, said)
            found = blame(wait, watch.ask(), watch.wires.lost)
            if found.kind == "broken":
                with changed:  # nobody is to blame as far as can be seen; whoever is may still tell
                    changed.wait_for(lambda: watch.failure is not None, ANSWER_S)
            watch.fail(found)
        assert watch.failure is not None
        return watch.failure.error(watch.rank, turn.phase)
