"""The `mpi` transport: mpi4py's non-blocking collectives, rows as bytes.

Legend: W ranks, S rows sent, R rows received, D row width.

For machines whose network is served by an MPI library, and for jobs that mpiexec starts. Counts and displacements are
in rows, by a datatype of one row's bytes: they then fit MPI's 32-bit integers however many bytes there are. MPI itself
does not notice when ranks are in different collectives, it mixes up their bytes; so with each of ours travels a header
of what the sender believes it is sending, which is read first. Rows on a GPU pass through pinned memory of the host, as
an MPI that knows GPUs is the exception.

MPI has no timeout, so a wait polls, and is a `Channel`'s: it ends when the group fails anywhere. A poll moves a few KB,
so many follow one another where many bytes are under way, and sleeps between them grow: ranks may share cores, and one
that spins takes the core the others need. Rejected: MPI_Wait in a thread, which cannot be ended and spins on a core of
its own.

Most MPI libraries move nothing between calls: rows that are waited for later move then, beside no computing. MPICH
moves them meanwhile where MPIR_CVAR_ASYNC_PROGRESS=1 is set, on a core of its own.
"""

import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crossdock.comm.agreement import agree_on_parts, odd_one
from crossdock.comm.transport import Pending, Then, bytes_of, part_topology
from crossdock.errors import ConfigError, CrossdockError
from crossdock.parallel import EPGroup, Topology
from crossdock.parallel.mpi_launch import MISSING, MpiJob
from crossdock.parallel.standing import Failure, Turn

HOT_POLLS = 50  # before the first sleep
BYTES_A_POLL = 8192  # about half of what one poll of MPICH moves through shared memory
LONGEST_BURST = 256  # polls between two sleeps: 4 MB of rows, or 0.1 ms where nothing moves
PAUSES_S = (20e-6, 1e-3)  # the first and the longest sleep
LONGEST_CALL_S = 0.02  # that a poll waits for another thread's call into MPI: one that divides ranks may never return
INTEGERS, ROWS = 0, 1


class Sent(NamedTuple):
    """What a rank says it sends: `items` of `width` bytes each, over the transport whose name has that checksum."""

    transport: int
    kind: int
    width: int
    items: int
    phase: bytes


HEADER = np.dtype([*((name, "i8") for name in Sent._fields[:4]), ("phase", "S72")])
_yield_core = getattr(os, "sched_yield", lambda: None)
_one_call = threading.Lock()  # MPI is initialised for one caller at a time, and a backward pass may be another thread
_row_types: dict[int, Any] = {}  # MPI datatypes by the bytes of a row
_under_way: set["_Moving"] = set()  # MPI may yet write to their buffers, even if nobody waits for them any more


class _Moving:
    """Collectives under way, in order: a header, checked as soon as it is there, and what it announces."""

    def __init__(self, size: int) -> None:
        """`size` is the number of bytes that move here."""
        self.requests: list[Any] = []
        self.buffers: list[Any] = []
        self.check: Callable[[], None] | None = None
        self.error: RuntimeError | None = None
        self._polls, self._burst = HOT_POLLS + size // BYTES_A_POLL, 16 + min(size // BYTES_A_POLL, LONGEST_BURST)
        self._pause = PAUSES_S[0]

    def start(self, begin: Callable[..., Any], *arguments: Any) -> None:
        """begin(*arguments) of mpi4py; where MPI refuses, `poll` raises it."""
        _under_way.add(self)
        self.buffers += arguments
        try:
            with _one_call:
                self.requests.append(begin(*arguments))
        except RuntimeError as error:
            self.error = error

    def poll(self, seconds: float) -> bool:
        """Waits no longer than that, and says whether all has moved. Raises what MPI or the check of the header did."""
        if self.error is not None:
            raise self.error
        end = time.monotonic() + seconds
        while not self._advance(self._polls):
            if time.monotonic() >= end:
                return False
            time.sleep(self._pause)
            self._polls, self._pause = self._burst, min(1.2 * self._pause, PAUSES_S[1])
        _under_way.discard(self)
        return True

    def _advance(self, polls: int) -> bool:
        for _ in range(polls):
            if not _one_call.acquire(timeout=LONGEST_CALL_S):
                return False
            try:
                done = self.requests[0].Test()
            finally:
                _one_call.release()
            if not done:
                _yield_core()
                continue
            self.requests.pop(0)
            if self.check is not None:
                self.check()
                self.check = None
            if not self.requests:
                return True
        return False


class MpiTransport:
    """Collectives over the communicator of `group`, which mpiexec started. Raises ConfigError for another group."""

    name = "mpi"

    def __init__(self, group: EPGroup) -> None:
        if find_spec("mpi4py") is None:
            raise ConfigError(MISSING)
        if group.communicator is None:
            raise ConfigError("transport 'mpi' needs ranks that mpiexec started, as by: mpiexec -n 4 crossdock ...")
        job: MpiJob = group.communicator
        self._place(group, job.comm, job.name(), group.members, group.topology)

    def _place(self, group: EPGroup, comm: Any, name: str, members: tuple[int, ...], topology: Topology) -> None:
        self._group, self._comm = group, comm
        self.members, self.topology = members, topology
        self.rank, self.world_size = members.index(group.members[group.rank]), len(members)
        self.timeout_s = group.timeout_s
        self._channel = self._job().watch.channel(name, members, group.timeout_s)
        self._users = self._splits = 0

    def _job(self) -> MpiJob:
        if self._group.communicator is None:
            raise ConfigError(f"rank {self._group.members[self._group.rank]}: the group of this transport is closed")
        job: MpiJob = self._group.communicator
        return job

    def abort(self, why: str) -> None:
        self._channel.watch.abort(why)

    def split(self, parts: Sequence[Sequence[int]]) -> "MpiTransport":
        number, part = agree_on_parts(self, parts)
        self._splits += 1

        def divide() -> Any:
            with _one_call:
                return self._comm.Split(number, self.rank)

        comm = self._channel.run("split", divide)
        comm.Set_errhandler(self._job().mpi.ERRORS_RETURN)
        mine = MpiTransport.__new__(MpiTransport)
        name = f"{self._channel.name}, part {number} of split {self._splits}"
        members = tuple(self.members[rank] for rank in part)
        mine._place(self._group, comm, name, members, part_topology(self.topology, part))
        return mine

    def register(self) -> int:
        self._users += 1
        return self._users - 1

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        turn = self._enter(phase)
        mine_N = np.array(values, dtype=np.int64)
        all_WN = np.empty((self.world_size, len(values)), dtype=np.int64)
        moving = _Moving(all_WN.nbytes)
        counts = [len(values)] * self.world_size
        self._announce(moving, turn, INTEGERS, 8, counts, counts)
        moving.start(self._comm.Iallgather, mine_N, all_WN)
        self._channel.wait(turn, moving.poll)
        rows: list[list[int]] = all_WN.tolist()
        return rows

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        bytes_SB = bytes_of(rows_SD.detach())
        width, on_gpu = bytes_SB.shape[1], bytes_SB.is_cuda
        sent_SB = _to_host(bytes_SB) if on_gpu else bytes_SB
        arrived_RB = torch.empty(sum(recv_counts), width, dtype=torch.uint8, pin_memory=on_gpu)
        turn = self._enter(phase)  # not before there is room for what arrives
        if width not in _row_types:
            _row_types[width] = self._job().mpi.BYTE.Create_contiguous(width).Commit()
        moving = _Moving(max(sent_SB.numel(), arrived_RB.numel()))
        self._announce(moving, turn, ROWS, width, send_counts, recv_counts)
        moving.start(
            self._comm.Ialltoallv,
            [sent_SB.numpy(), (send_counts, _starts(send_counts)), _row_types[width]],
            [arrived_RB.numpy(), (recv_counts, _starts(recv_counts)), _row_types[width]],
        )

        def finish() -> Tensor:
            self._channel.wait(turn, moving.poll)
            return arrived_RB.to(bytes_SB.device, non_blocking=on_gpu).view(rows_SD.dtype)

        return Then(finish)

    def _enter(self, phase: str) -> Turn:
        turn = self._channel.enter(phase)
        self._job()  # there is none once the group has been closed
        return turn

    def _announce(
        self, moving: _Moving, turn: Turn, kind: int, width: int, sent: list[int], expected: list[int]
    ) -> None:
        """Tells each rank what it is about to get from here, and has what the others tell checked."""

        def headers(counts: list[int]) -> Any:
            name, phase = zlib.crc32(self._channel.name.encode()), turn.phase.encode()
            return np.array([(name, kind, width, count, phase) for count in counts], dtype=HEADER)

        arrived_W: Any = np.empty(self.world_size, dtype=HEADER)

        def check() -> None:
            theirs_W, ours_W = arrived_W.tolist(), headers(expected).tolist()
            for rank, (theirs, ours) in enumerate(zip(theirs_W, ours_W, strict=True)):
                if theirs != ours and not (kind == INTEGERS and theirs[:4] == ours[:4]):
                    raise self._mismatch([Sent(*told) for told in theirs_W], rank, Sent(*ours), turn)

        moving.check = check
        moving.start(self._comm.Ialltoall, headers(sent).view(np.uint8), arrived_W.view(np.uint8))

    def _mismatch(self, theirs_W: list[Sent], rank: int, ours: Sent, turn: Turn) -> CrossdockError:
        """Makes it the group's failure: what was started behind the headers does not fit together.

        All ranks have the same phases before them, and find the same one to be elsewhere.
        """
        watch, by = self._channel.watch, self.rank
        elsewhere = odd_one([(theirs.transport, theirs.kind, theirs.phase) for theirs in theirs_W])
        sizes = [(theirs.width, theirs.items if theirs.kind == INTEGERS else 0) for theirs in theirs_W]
        other = odd_one(sizes)  # only numbers of rows differ by who they are for
        if elsewhere is not None:
            rank, by = elsewhere
            transport = "" if theirs_W[rank].transport == theirs_W[by].transport else " by another transport"
            what = f"is elsewhere: {theirs_W[rank].phase.decode(errors='replace')}{transport}"
        else:
            if other is not None:
                rank, by = other
                ours = theirs_W[by]
            theirs = theirs_W[rank]
            what = f"sends {theirs.items} of {theirs.width} bytes, expected {ours.items} of {ours.width}"
        failure = Failure("mismatch", (self.members[rank],), f"rank {self.members[rank]} {what}", self.members[by])
        return watch.fail(failure).error(watch.rank, turn.phase)


def _starts(counts: list[int]) -> list[int]:
    return [0, *accumulate(counts[:-1])]


def _to_host(bytes_SB: Tensor) -> Tensor:
    """A pinned copy; the device is waited for, as MPI reads it next."""
    copy_SB = torch.empty(bytes_SB.shape, dtype=torch.uint8, pin_memory=True)
    copy_SB.copy_(bytes_SB, non_blocking=True)
    torch.cuda.current_stream(bytes_SB.device).synchronize()
    return copy_SB
