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

from crossdock.comm.transport import Done, Pending, Then, check_parts, part_topology
from crossdock.errors import CommTimeout, ConfigError, PlanMismatch, RankFailure
from crossdock.parallel import Topology

T = TypeVar("T")


class LocalTransport:
    """A world of one: what is sent is what arrives."""

    name, rank, world_size = "local", 0, 1
    topology, members = Topology((0,)), (0,)

    def __init__(self, timeout_s: float = 300.0) -> None:
        self.timeout_s = timeout_s
        self._users = 0

    def split(self, parts: Sequence[Sequence[int]]) -> "LocalTransport":
        check_parts(parts, 1)
        return LocalTransport(self.timeout_s)

    def register(self) -> int:
        self._users += 1
        return self._users - 1

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        return [values]

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        return Done(rows_SD)


@dataclass(frozen=True)
class _Posted:
    """What a rank brings to a collective, and the phase it is in; rows of two phases must not meet, integers may."""

    kind: str
    phase: str
    payload: Any

    def meets(self, other: "_Posted") -> bool:
        return self.kind == other.kind and (self.kind == "integers" or self.phase == other.phase)


@dataclass
class _Board:
    """Where virtual ranks leave what others read: what W ranks brought to each collective, in call order.

    `members` are the ranks' numbers in the world, `parts` the boards of those that split off, by turn and part.
    """

    members: tuple[int, ...]
    topology: Topology
    timeout_s: float
    changed: threading.Condition = field(default_factory=threading.Condition)
    payloads: dict[int, dict[int, _Posted]] = field(default_factory=dict)
    readers: dict[int, int] = field(default_factory=dict)
    gone: dict[int, str] = field(default_factory=dict)
    parts: dict[tuple[int, tuple[int, ...]], "_Board"] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return len(self.members)

    def part(self, turn: int, ranks: tuple[int, ...]) -> "_Board":
        """The board of `ranks`, who split off together at `turn`; made by the first of them."""
        with self.changed:
            if (turn, ranks) not in self.parts:
                members = tuple(self.members[rank] for rank in ranks)
                board = _Board(members, part_topology(self.topology, ranks), self.timeout_s)
                board.gone = {ranks.index(rank): why for rank, why in self.gone.items() if rank in ranks}
                self.parts[turn, ranks] = board
            return self.parts[turn, ranks]

    def post(self, turn: int, rank: int, posted: _Posted) -> None:
        with self.changed:
            self.payloads.setdefault(turn, {})[rank] = posted
            self.changed.notify_all()

    def read(self, turn: int, rank: int, phase: str) -> list[Any]:
        """All W payloads of a collective, when they are there."""
        where = f"rank {self.members[rank]}: {phase}"
        with self.changed:
            posted = self.payloads.setdefault(turn, {})
            arrived = self.changed.wait_for(
                lambda: len(posted) == self.world_size or self._lost(posted), self.timeout_s
            )
            missing = [r for r in range(self.world_size) if r not in posted]
            if missing and not arrived:
                late = [self.members[r] for r in missing]
                raise CommTimeout(f"{where}: ranks {late} did not arrive within {self.timeout_s:g} s")
            if missing:
                lost = self._lost(posted)[0]
                raise RankFailure(f"{where}: rank {self.members[lost]} is gone: {self.gone[lost]}")
            self.readers[turn] = self.readers.get(turn, 0) + 1
            if self.readers[turn] == self.world_size:
                del self.payloads[turn], self.readers[turn]
        for r in range(self.world_size):
            if not posted[r].meets(posted[rank]):
                raise PlanMismatch(f"{where}: rank {self.members[r]} is elsewhere: {posted[r].phase}")
        return [posted[r].payload for r in range(self.world_size)]

    def leave(self, rank: int, why: str) -> None:
        with self.changed:
            self.gone[rank] = why
            self.changed.notify_all()
            parts = [(ranks, board) for (_, ranks), board in self.parts.items() if rank in ranks]
        for ranks, board in parts:
            board.leave(ranks.index(rank), why)

    def _lost(self, posted: dict[int, Any]) -> list[int]:
        return [r for r in self.gone if r not in posted]


class VirtualTransport:
    """One virtual rank of a LocalWorld."""

    name = "local"

    def __init__(self, board: _Board, rank: int) -> None:
        self.rank, self.world_size, self.timeout_s = rank, board.world_size, board.timeout_s
        self.topology, self.members = board.topology, board.members
        self._board, self._turn, self._users = board, 0, 0

    def split(self, parts: Sequence[Sequence[int]]) -> "VirtualTransport":
        check_parts(parts, self.world_size)
        turn = self._post("split", "split", [list(part) for part in parts])
        for theirs in self._board.read(turn, self.rank, "split"):
            if theirs != [list(part) for part in parts]:
                raise PlanMismatch(f"rank {self.members[self.rank]}: split: parts differ: {theirs}, here {parts}")
        part = next(tuple(part) for part in parts if self.rank in part)
        return VirtualTransport(self._board.part(turn, part), part.index(self.rank))

    def register(self) -> int:
        self._users += 1
        return self._users - 1

    def _post(self, kind: str, phase: str, payload: Any) -> int:
        self._turn += 1
        self._board.post(self._turn, self.rank, _Posted(kind, phase, payload))
        return self._turn

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        turn = self._post("integers", phase, values)
        return self._board.read(turn, self.rank, phase)

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        turn = self._post("rows", phase, torch.split(rows_SD, send_counts))

        def finish() -> Tensor:
            return torch.cat([pieces[self.rank] for pieces in self._board.read(turn, self.rank, phase)])

        return Then(finish)


class LocalWorld:
    """W virtual ranks. An exception in one rank ends the others' waits at once, and is what `run` raises.

    `topology` places them on as many nodes as are to be pretended; one by default.
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
        board = _Board(tuple(range(self.world_size)), self.topology, self.timeout_s)
        results: dict[int, T] = {}
        errors: dict[int, BaseException] = {}
        grad = torch.is_grad_enabled()

        def work(rank: int) -> None:
            why = "it has finished"
            try:
                with torch.set_grad_enabled(grad):
                    results[rank] = fn(VirtualTransport(board, rank))
            except BaseException as error:
                errors[rank] = error
                why = f"{type(error).__name__}: {error}"
            finally:
                board.leave(rank, why)

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
