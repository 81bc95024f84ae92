"""Who is to blame for a wait that does not end: a function of where every rank stands.

A broken connection says that something broke, not whose fault it is: the rank at its other end may itself be waiting
for a third. So every rank keeps note of the collectives it has entered and of the one it waits for, and a wait that
fails asks for everybody's notes and follows them: from the collective waited for, over those who have not come to it,
through whatever they wait for, to the ranks that wait for nobody. Ranks that no such path meets are never named.

    rank 0 waits in the world for 1, 2, 3;  rank 1 waits in a part for 2;  2 and 3 wait for nothing
    -> rank 2 and rank 3 are late.          had rank 3 come: rank 2 alone

Rejected: naming whoever did not answer a roll call. It cannot tell a slow rank from a waiting one.
"""

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from crossdock.errors import CapacityOverflow, CommTimeout, CrossdockError, PlanMismatch, RankFailure

REMEMBERED = 16  # phases kept of each channel
SETTLE_S = 0.3  # what a lost rank sent before its end may still be arriving, and so may the news of a second one
ANSWER_S = 2.0  # how long a rank may take to say where it stands before it counts as silent
AS_LATE = 0.5  # share of the timeout by which the last to come must trail this rank to be called late


class Turn(NamedTuple):
    """A collective that a rank has entered: its number on the channel, its phase, and when (this rank's clock)."""

    number: int
    phase: str
    began: float


@dataclass
class Place:
    """Where a rank stands on one channel: collectives entered, the last of them, and which it waits for (0: none)."""

    members: tuple[int, ...]
    turn: int = 0
    waiting: int = 0
    recent: "deque[Turn]" = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def enter(self, phase: str) -> Turn:
        self.turn += 1
        entered = Turn(self.turn, phase, time.monotonic())
        self.recent.append(entered)
        return entered

    def entered(self, number: int) -> Turn | None:
        """That turn; None for one not entered, or long past."""
        return next((turn for turn in self.recent if turn.number == number), None)

    def told(self) -> list[Any]:
        """As it travels; times become ages, as every process has its own clock."""
        now = time.monotonic()
        recent = [(turn.number, turn.phase, now - turn.began) for turn in list(self.recent)]
        return [self.members, self.turn, self.waiting, recent]

    @classmethod
    def heard(cls, told: list[Any]) -> "Place":
        members, turn, waiting, recent = told
        now = time.monotonic()
        place = cls(tuple(members), turn, waiting)
        place.recent.extend(Turn(number, phase, now - age) for number, phase, age in recent)
        return place


Standing = dict[str, Place]  # by the channel's name


@dataclass(frozen=True)
class Lost:
    """A rank whose connection ended: `told` is what it said last, None where it ended without a word."""

    why: str
    told: Standing | None = None

    def was_there(self, channel: str, turn: int) -> bool:
        """Whether it left only after it had done its part of that collective."""
        return self.told is not None and channel in self.told and self.told[channel].turn >= turn


@dataclass(frozen=True)
class Failure:
    """Why a group is of no further use. `kind` is a key of ERRORS, `ranks` are to blame, `by` found out."""

    kind: str
    ranks: tuple[int, ...]
    text: str
    by: int

    def error(self, rank: int, phase: str) -> CrossdockError:
        """As rank `rank` raises it."""
        if rank in self.ranks and self.by != rank and self.kind != "abort":
            what = f"the others gave up on this rank (found by rank {self.by}): {self.text}"
        else:
            what = self.text if self.by in (rank, *self.ranks) else f"{self.text} (found by rank {self.by})"
        return ERRORS[self.kind](f"rank {rank}: {phase}: {what}")

    def told(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def heard(cls, told: dict[str, Any]) -> "Failure":
        return cls(told["kind"], tuple(told["ranks"]), told["text"], told["by"])


ERRORS: dict[str, type[CrossdockError]] = {
    "abort": RankFailure,
    "gone": RankFailure,
    "silent": RankFailure,
    "broken": RankFailure,
    "late": CommTimeout,
    "stuck": CommTimeout,
    "mismatch": PlanMismatch,
    "overflow": CapacityOverflow,
}


@dataclass(frozen=True)
class Wait:
    """A wait of rank `rank` that has failed after `waited` seconds: on which channel, for which collective.

    `broke`: what a library said of an exchange that broke well before its time was over; empty where the time passed.
    """

    rank: int
    channel: str
    turn: Turn
    waited: float
    timeout_s: float
    broke: str = ""


def blame(wait: Wait, standings: Mapping[int, Standing | None], lost: Mapping[int, Lost]) -> Failure:
    """The cause of a failed wait, from where every rank stands; a rank with None gave no answer.

    `standings` holds this rank's own. Ranks lost come before ranks that are silent, and those before ranks that are
    late: a rank may be late because another is lost. Nobody is late for an exchange that broke before its time.
    """
    search = _Search(standings, lost)
    search.follow(wait.channel, wait.turn.number)
    if search.gone:
        return Failure("gone", tuple(sorted(search.gone)), gone_text(search.gone, lost), wait.rank)
    if search.silent:
        text = f"no sign of {name_ranks(search.silent)}: gone or stuck"
        return Failure("silent", tuple(sorted(search.silent)), text, wait.rank)
    if wait.broke:
        odd = _other_phase(wait, standings) or (None if search.late else _crossed(wait, standings, search))
        return odd or Failure("broken", (), f"the exchange broke: {wait.broke}", wait.rank)
    if search.late:
        text = f"{name_ranks(search.late)} did not arrive within {wait.timeout_s:g} s{_last(search.late, standings)}"
        return Failure("late", tuple(sorted(search.late)), text, wait.rank)
    return _other_phase(wait, standings) or _crossed(wait, standings, search) or _last_to_come(wait, standings)


class _Search:
    """Follows who waits for whom; fills `gone`, `silent`, `late`, and `elsewhere`: who waits in another collective."""

    def __init__(self, standings: Mapping[int, Standing | None], lost: Mapping[int, Lost]) -> None:
        self.standings, self.lost = standings, lost
        self.gone: set[int] = set()
        self.silent: set[int] = set()
        self.late: set[int] = set()
        self.elsewhere: set[int] = set()

    def follow(self, channel: str, turn: int) -> None:
        ahead, seen = [(channel, turn)], set()
        while ahead:
            channel, turn = step = ahead.pop()
            if step in seen:
                continue
            seen.add(step)
            for rank in self._members(channel):
                ahead += self._look(rank, channel, turn)

    def _members(self, channel: str) -> tuple[int, ...]:
        return next(s[channel].members for s in self.standings.values() if s is not None and channel in s)

    def _look(self, rank: int, channel: str, turn: int) -> list[tuple[str, int]]:
        """Sorts one rank of a collective; what it waits for itself, where it has not come to this one."""
        if rank in self.lost:
            if not self.lost[rank].was_there(channel, turn):
                self.gone.add(rank)
            return []
        standing = self.standings.get(rank)
        if standing is None:
            self.silent.add(rank)
            return []
        if channel in standing and standing[channel].turn >= turn:
            return []
        waits = [(name, place.waiting) for name, place in standing.items() if place.waiting]
        (self.elsewhere if waits else self.late).add(rank)
        return waits


def _other_phase(wait: Wait, standings: Mapping[int, Standing | None]) -> Failure | None:
    """Who entered the same turn in another phase than most; where no phase has most ranks, another than this rank."""
    phases = {rank: turn.phase for rank, turn in _entered(wait, standings).items()} | {wait.rank: wait.turn.phase}
    (common, most), *others = Counter(phases.values()).most_common()
    if not others:
        return None
    if others[0][1] == most:
        rank = min(rank for rank, phase in phases.items() if phase != wait.turn.phase)
        return Failure("mismatch", (rank,), f"rank {rank} is elsewhere: {phases[rank]}", wait.rank)
    odd = tuple(sorted(rank for rank, phase in phases.items() if phase != common))
    where = ", ".join(f"rank {rank} is elsewhere: {phases[rank]}" for rank in odd)
    return Failure("mismatch", odd, f"{where} (most are in {common})", wait.rank)


def _crossed(wait: Wait, standings: Mapping[int, Standing | None], search: _Search) -> Failure | None:
    """Ranks that wait for one another in different collectives."""
    if not search.elsewhere:
        return None
    where = [f"rank {rank} in {_waits_in(standings[rank])}" for rank in sorted(search.elsewhere)]
    text = f"ranks wait for one another: {', '.join(where)}"
    return Failure("mismatch", tuple(sorted(search.elsewhere)), text, wait.rank)


def _last_to_come(wait: Wait, standings: Mapping[int, Standing | None]) -> Failure:
    """All are there by now: whoever came long after this rank is late, else it took too long."""
    came = _entered(wait, standings)
    late = {r for r, turn in came.items() if turn.began - wait.turn.began > AS_LATE * wait.timeout_s}
    if late:
        text = f"{name_ranks(late)} came too late for {wait.timeout_s:g} s"
        return Failure("late", tuple(sorted(late)), text, wait.rank)
    return Failure("stuck", (), f"all ranks came, but it did not end within {wait.timeout_s:g} s", wait.rank)


def _entered(wait: Wait, standings: Mapping[int, Standing | None]) -> dict[int, Turn]:
    """Who has entered the collective waited for, and when and as what; those who have long left it are not in it."""
    found = {}
    for rank, standing in standings.items():
        place = standing.get(wait.channel) if standing is not None else None
        turn = place.entered(wait.turn.number) if place is not None else None
        if turn is not None:
            found[rank] = turn
    return found


def gone_text(gone: set[int], lost: Mapping[int, Lost]) -> str:
    """Such as: rank 2 is gone: the process ended."""
    why = ", ".join(sorted({lost[rank].why for rank in gone}))
    return f"{name_ranks(gone)} {'is' if len(gone) == 1 else 'are'} gone: {why}"


def name_ranks(ranks: set[int] | tuple[int, ...]) -> str:
    """rank 2, rank 5."""
    return ", ".join(f"rank {rank}" for rank in sorted(ranks))


def _last(late: set[int], standings: Mapping[int, Standing | None]) -> str:
    """What the first of the late ranks did last, where it has done anything."""
    standing = standings[min(late)] or {}
    entered = [place.recent[-1] for place in standing.values() if place.recent]
    return f"; the last it did was {max(entered, key=lambda turn: turn.began).phase}" if entered else ""


def _waits_in(standing: Standing | None) -> str:
    waiting = [place.entered(place.waiting) for place in (standing or {}).values() if place.waiting]
    return next((turn.phase for turn in waiting if turn is not None), "another exchange")
