"""The `local` transport: virtual ranks as threads of one process, and the world of one that needs none.

A `LocalWorld` runs the same code as a cluster in a test, a notebook or a debugger:

    LocalWorld(4).run(lambda transport: MoELayer(config, transport)(x_by_rank[transport.rank]))
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from crossdock.comm.agreement import odd_one
from crossdock.comm.transport import Done, Pending, Then, check_parts, part_topology
from crossdock.errors import ConfigError, RankFailure
from crossdock.parallel import Topology
from crossdock.parallel.standing import Failure, Lost, Place, Standing, Turn, Wait, blame

T = TypeVar("T")


class LocalTransport:
    """A world of one: what is sent is what arrives."""

    name, rank, world_size = "local", 0, 1
    topology, members = Topology((0,)), (0,)

    def __init__(self, timeout_s: float = 300.0) -> None:
        self.timeout_s = timeout_s
        self._users = 0
        self._failures: list[Failure] = []  # shared with its parts; the first one is it

    def split(self, parts: Sequence[Sequence[int]]) -> "LocalTransport":
        check_parts(parts, 1)
        part = LocalTransport(self.timeout_s)
        part._failures = self._failures
        return part

    def register(self) -> int:
        self._users += 1
        return self._users - 1

    def abort(self, why: str) -> None:
        self._failures.append(_abortion(0, why))

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        self._check(phase)
        return [values]

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        self._check(phase)
        return Done(rows_SD)

    def _check(self, phase: str) -> None:
        if self._failures:
            raise self._failures[0].error(0, phase)


def _abortion(rank: int, why: str) -> Failure:
    return Failure("abort", (rank,), f"rank {rank} gave up: {why}", rank)


@dataclass(frozen=True)
class _Posted:
    """What a rank brings to a collective, and the phase it is in.

    Rows of two phases must not meet. Integers may, where they are equally many: who gathers them tells more of it.
    """

    kind: str
    phase: str
    payload: Any

    @property
    def fits(self) -> tuple[str, object]:
        """Equal where they may meet."""
        return self.kind, len(self.payload) if self.kind == "integers" else self.phase

    def differs(self, other: "_Posted") -> str:
        """How, to the rank that has brought `other`."""
        if self.phase != other.phase or self.kind != other.kind:
            return f"is elsewhere: {self.phase}"
        return f"gathers {len(self.payload)} integers, expected {len(other.payload)}"


@dataclass
class _World:
    """What all virtual ranks know of one another, whatever parts they are in: as `crossdock.parallel.watch`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    standings: dict[int, Standing] = field(default_factory=dict)
    lost: dict[int, Lost] = field(default_factory=dict)
    failure: Failure | None = None

    def fail(self, failure: Failure) -> Failure:
        """Makes `failure` the world's, unless it has one; returns the one that is."""
        with self.changed:
            self.failure = self.failure or failure
            self.changed.notify_all()
            return self.failure

    def leave(self, rank: int, why: str, in_order: bool) -> None:
        with self.changed:
            self.lost[rank] = Lost(why, self.standings.get(rank, {}) if in_order else None)
            self.changed.notify_all()


@dataclass
class _Board:
    """Where virtual ranks leave what others read: what W ranks brought to each collective, in call order.

    `members` are the ranks' numbers in the world, `parts` the boards of those that split off, by turn and part.
    """

    world: _World
    name: str
    members: tuple[int, ...]
    topology: Topology
    timeout_s: float
    payloads: dict[int, dict[int, _Posted]] = field(default_factory=dict)
    readers: dict[int, int] = field(default_factory=dict)
    parts: dict[tuple[int, tuple[int, ...]], "_Board"] = field(default_factory=dict)

    def part(self, turn: int, ranks: tuple[int, ...]) -> "_Board":
        """The board of `ranks`, who split off together at `turn`; made by the first of them."""
        with self.world.changed:
            if (turn, ranks) not in self.parts:
                members = tuple(self.members[rank] for rank in ranks)
                name, topology = f"{self.name}, {ranks} of {turn}", part_topology(self.topology, ranks)
                self.parts[turn, ranks] = _Board(self.world, name, members, topology, self.timeout_s)
            return self.parts[turn, ranks]

    def post(self, turn: int, rank: int, posted: _Posted) -> None:
        with self.world.changed:
            self.payloads.setdefault(turn, {})[rank] = posted
            self.world.changed.notify_all()

    def read(self, turn: Turn, rank: int) -> list[Any]:
        """All W payloads of a collective, when they are there."""
        world_size, world = len(self.members), self.world
        with world.changed:
            posted = self.payloads.setdefault(turn.number, {})
            world.changed.wait_for(
                lambda: len(posted) == world_size or world.failure or self._missed(posted), self.timeout_s
            )
            if len(posted) < world_size:
                wait = Wait(self.members[rank], self.name, turn, time.monotonic() - turn.began, self.timeout_s)
                failure = world.failure or world.fail(blame(wait, world.standings, world.lost))
                raise failure.error(self.members[rank], turn.phase)
            self.readers[turn.number] = self.readers.get(turn.number, 0) + 1
            if self.readers[turn.number] == world_size:
                del self.payloads[turn.number], self.readers[turn.number]
        found = odd_one([posted[r].fits for r in range(world_size)])
        if found is not None:
            odd, other = found
            raise self.differ(turn, rank, found, posted[odd].differs(posted[other]))
        return [posted[r].payload for r in range(world_size)]

    def differ(self, turn: Turn, rank: int, found: tuple[int, int], how: str) -> Exception:
        """The error of `rank`, and with it the end of the world, where `odd_one` has `found` one."""
        odd, other = (self.members[r] for r in found)
        by = self.members[rank] if rank != found[0] else other
        failure = Failure("mismatch", (odd,), f"rank {odd} {how}", by)
        self.world.fail(failure)
        return failure.error(self.members[rank], turn.phase)

    def _missed(self, posted: dict[int, _Posted]) -> bool:
        return any(self.members[r] in self.world.lost for r in range(len(self.members)) if r not in posted)


class VirtualTransport:
    """One virtual rank of a LocalWorld."""

    name = "local"

    def __init__(self, board: _Board, rank: int) -> None:
        self.rank, self.world_size, self.timeout_s = rank, len(board.members), board.timeout_s
        self.topology, self.members = board.topology, board.members
        self._board, self._users = board, 0
        self._place = Place(board.members)
        with board.world.changed:
            board.world.standings.setdefault(self.members[rank], {})[board.name] = self._place

    def split(self, parts: Sequence[Sequence[int]]) -> "VirtualTransport":
        check_parts(parts, self.world_size)
        listed = [list(part) for part in parts]
        turn = self._post("split", "split", listed)
        told = self._read(turn)
        found = odd_one(told)
        if found is not None:
            odd, other = (told[rank] for rank in found)
            raise self._board.differ(turn, self.rank, found, f"has other parts: {odd}, expected {other}")
        part = next(tuple(part) for part in parts if self.rank in part)
        return VirtualTransport(self._board.part(turn.number, part), part.index(self.rank))

    def register(self) -> int:
        self._users += 1
        return self._users - 1

    def abort(self, why: str) -> None:
        self._board.world.fail(_abortion(self.members[self.rank], why))

    def _post(self, kind: str, phase: str, payload: Any) -> Turn:
        failure = self._board.world.failure
        if failure is not None:
            raise failure.error(self.members[self.rank], phase)
        turn = self._place.enter(phase)
        self._board.post(turn.number, self.rank, _Posted(kind, phase, payload))
        return turn

    def _read(self, turn: Turn) -> list[Any]:
        self._place.waiting = turn.number
        try:
            return self._board.read(turn, self.rank)
        finally:
            self._place.waiting = 0

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        return self._read(self._post("integers", phase, values))

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        turn = self._post("rows", phase, torch.split(rows_SD, send_counts))
        return Then(lambda: torch.cat([pieces[self.rank] for pieces in self._read(turn)]))


class LocalWorld:
    """W virtual ranks. An exception in one rank ends the others' waits at once, and is what `run` raises.

    `topology` places them on as many nodes as are to be pretended; one by default. Waits for another rank end after
    `timeout_s` seconds with CommTimeout. Raises ConfigError for less than one rank, and for a topology of others.
    """

    def __init__(self, world_size: int, timeout_s: float = 60.0, topology: Topology | None = None) -> None:
        if world_size < 1:
            raise ConfigError(f"world_size must be at least 1, found {world_size}")
        self.world_size, self.timeout_s = world_size, timeout_s
        self.topology = topology or Topology((0,) * world_size)
        if len(self.topology.node_of_rank) != world_size:
            found = len(self.topology.node_of_rank)
            raise ConfigError(f"topology must place {world_size} ranks, found one of {found}")

    def run(self, fn: Callable[[VirtualTransport], T]) -> list[T]:
        """Calls fn(transport) once for each rank, each in its thread; returns the results by rank."""
        world = _World()
        board = _Board(world, "world", tuple(range(self.world_size)), self.topology, self.timeout_s)
        results: dict[int, T] = {}
        errors: dict[int, BaseException] = {}
        grad = torch.is_grad_enabled()

        def work(rank: int) -> None:
            why, in_order = "it has finished", True
            try:
                # torch has one thread a device for backward passes: a rank that waits in it would keep out the others
                with torch.set_grad_enabled(grad), torch.autograd.set_multithreading_enabled(False):
                    results[rank] = fn(VirtualTransport(board, rank))
            except BaseException as error:
                errors[rank] = error
                why, in_order = f"{type(error).__name__}: {error}", False
            finally:
                world.leave(rank, why, in_order)

        threads = [
            threading.Thread(target=work, args=(r,), name=f"rank {r}", daemon=True) for r in range(self.world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            _until_ended(threads)  # then the first cause, rather than a rank that lost its peer because of it
            raise min(errors.items(), key=lambda item: (isinstance(item[1], RankFailure), item[0]))[1]
        return [results[rank] for rank in range(self.world_size)]


def _until_ended(threads: list[threading.Thread]) -> None:
    """Waits up to a second until the system, too, has ended joined threads.

    A join returns a moment earlier; what torch's autograd clears up in that moment, after an error in a backward, would
    abort a process that is already exiting. Only Linux tells; elsewhere this waits for nothing.
    """
    deadline = time.monotonic() + 1.0
    while any(os.path.exists(f"/proc/self/task/{t.native_id}") for t in threads) and time.monotonic() < deadline:
        time.sleep(0.001)
