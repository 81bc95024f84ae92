"""Joins the ranks that mpiexec started, and leaves MPI when the process ends.

mpi4py initialises MPI when it is imported, and keeps Python's lock until every rank has come: nothing in this process
could end that wait. So MPI_Init_thread is called here by way of ctypes, which lets go of the lock, from a thread that
is left behind where a rank does not come in time. To finalise MPI is to wait for all ranks as well: it happens behind a
barrier that looks whether they still live, and not at all once the group has failed. A script that has imported
mpi4py.MPI itself keeps both in its own hands.

What becomes of a job when one of its processes dies is the launcher's choice: MPI itself does not notice, where ranks
share memory. MPICH's mpiexec kills all others at once. With -disable-auto-cleanup it lets them be where the process
ended by itself, and not by a signal; they learn of it from the wires between ranks (`parallel.wires`).
"""

import atexit
import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from crossdock.errors import CommTimeout, ConfigError, RankFailure
from crossdock.parallel.bond import Bond, connect
from crossdock.parallel.bounded import bounded
from crossdock.parallel.dialling import connect_all
from crossdock.parallel.meeting import Arrival, Listener, disagreement, topology_of
from crossdock.parallel.topology import Topology
from crossdock.parallel.watch import Watch, say_goodbye

if TYPE_CHECKING:
    from crossdock.parallel.group import EPGroup

T = TypeVar("T")
MISSING = "transport 'mpi' needs mpi4py: pip install 'crossdock[mpi]'"
LEAST_S = 1.0  # what is left of the timeout for the last step, at least
LOOK_S = 0.05  # how often a process that is about to end looks for the others
GRACE_S = 1.0  # how long it stays after a failure: mpiexec ends the others once it is gone, who have a word to say, too


@dataclass(frozen=True)
class Process:
    """Where a rank runs; `space` names the set of process ids that `pid` belongs to, empty where /proc does not say."""

    host: str
    space: str
    pid: int

    @classmethod
    def here(cls) -> "Process":
        space = ""
        with contextlib.suppress(OSError):
            space = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        return cls(socket.gethostname(), space, os.getpid())

    def has_ended(self) -> bool:
        """Whether this process can see that it has."""
        if not self.space or self.space != Process.here().space:
            return False
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        except OSError:
            return True


@dataclass(frozen=True)
class MpiJob:
    """The ranks of one mpiexec: mpi4py's module, a communicator that is crossdock's alone, and the watch over them."""

    mpi: Any
    comm: Any
    watch: Watch
    processes: tuple[Process, ...]
    topology: Topology
    _names: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def rank(self) -> int:
        return self.watch.rank

    @property
    def local_rank(self) -> int:
        """How many ranks before this one run on its host."""
        return sum(process.host == self.processes[self.rank].host for process in self.processes[: self.rank])

    def name(self) -> str:
        """A name for a channel, the same on all ranks, which ask for names in the same order."""
        return f"mpi {next(self._names)}"


_met: list[MpiJob | None] = []  # None: a meeting that failed
_starts: list[bool] = []  # of MPI's start in this process: whether it has ended


def load_mpi() -> Any:
    """The module mpi4py.MPI, with MPI as yet not initialised. Raises ConfigError where it is missing or has no MPI."""
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise ConfigError(MISSING) from error
    except (ImportError, RuntimeError) as error:  # it is there, and finds no MPI library
        raise ConfigError(f"{MISSING} ({' '.join(str(error).split())})") from error
    return MPI


def library_name(mpi: Any) -> str:
    """Such as "MPICH 5.0.2"."""
    first = mpi.Get_library_version().splitlines()[0]
    return " ".join(first.replace("Version:", "").partition(",")[0].split())


def join_mpi(rank: int, world_size: int, timeout_s: float, topology: Topology | None) -> MpiJob:
    """Meets the other ranks of this MPI job, which has `world_size` by what mpiexec says.

    Raises CommTimeout where they do not all come, and ConfigError where mpi4py belongs to another MPI than mpiexec or
    ranks were given different topologies.
    """
    mpi, limit = load_mpi(), Limit(rank, timeout_s, time.monotonic() + timeout_s)
    _start_mpi(mpi, world_size, limit)
    if mpi.Is_finalized():
        raise ConfigError(f"rank {rank}: MPI was finalised in this process and cannot start again")
    if mpi.COMM_WORLD.Get_size() != world_size:
        found = f"mpiexec started {world_size} ranks, and mpi4py's {library_name(mpi)} sees {mpi.COMM_WORLD.Get_size()}"
        raise ConfigError(f"rank {rank}: {found}: mpiexec and mpi4py belong to different installations of MPI")
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        raise ConfigError(f"rank {rank}: MPI was initialised below MPI_THREAD_SERIALIZED, which backward passes need")
    _met.append(None)
    missing = "the ranks did not all join"
    comm, processes = limit.of(lambda: _meet(mpi), missing)
    toward = _toward(processes)
    listener = Listener(rank, toward)
    try:
        mine = Arrival(listener.card, world_size, topology.node_of_rank if topology else ())
        met: list[Arrival] = limit.of(lambda: comm.allgather(mine), missing)
        problem = next(filter(None, (disagreement(mine, other) for other in met)), "")
        if problem:
            raise ConfigError(f"rank {rank}: {problem}")
        wires = connect_all(listener, [arrival.card for arrival in met], toward, time.monotonic() + limit.left())
    except BaseException:
        listener.socket.close()
        raise
    job = _met[-1] = MpiJob(mpi, comm, Watch(wires, tuple(range(world_size))), processes, topology_of(met))
    return job


def _start_mpi(mpi: Any, world_size: int, limit: "Limit") -> None:
    """Initialises MPI, unless it has been. Raises CommTimeout where not all ranks do so."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # hydra sends it where a rank died; it would end this process
    if start_is_pending():
        raise CommTimeout(f"rank {limit.rank}: init: MPI's start, which was given up before, has not ended yet")
    if mpi.Is_initialized():
        return
    try:
        limit.of(lambda: _initialise(mpi), f"the {world_size} ranks did not all start MPI")
    except CommTimeout:
        atexit.register(_end_at_once)
        raise
    atexit.register(_leave_mpi, mpi)


@dataclass(frozen=True)
class Limit:
    """How long rank `rank` waits for the others in all: until `deadline` (monotonic), `timeout_s` after it began."""

    rank: int
    timeout_s: float
    deadline: float

    def left(self) -> float:
        return max(LEAST_S, self.deadline - time.monotonic())

    def of(self, work: Callable[[], T], missing: str) -> T:
        """work(), which waits for all ranks. Raises CommTimeout once the time is over, RankFailure where MPI fails."""
        try:
            return bounded(work, self.left())
        except TimeoutError:
            raise CommTimeout(f"rank {self.rank}: init: {missing} within {self.timeout_s:g} s") from None
        except RuntimeError as error:
            raise RankFailure(f"rank {self.rank}: init: MPI reports: {' '.join(str(error).split())}") from error


def start_is_pending() -> bool:
    """Whether a thread of this process is still inside MPI's start, so that nothing can be asked of MPI."""
    return _starts == [False]


def _initialise(mpi: Any) -> None:
    _starts[:] = [False]
    provided = ctypes.c_int()
    library = ctypes.CDLL(mpi.__file__)  # finds MPI's functions in what mpi4py is linked to
    if library.MPI_Init_thread(None, None, ctypes.c_int(mpi.THREAD_SERIALIZED), ctypes.byref(provided)):
        raise RuntimeError("MPI_Init_thread failed")
    for comm in (mpi.COMM_WORLD, mpi.COMM_SELF):
        comm.Set_errhandler(mpi.ERRORS_RETURN)
    _starts[:] = [True]


def _end_at_once() -> None:
    """Ends this process while a thread is still inside MPI's start, which would crash as the library is taken down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _meet(mpi: Any) -> tuple[Any, tuple[Process, ...]]:
    """A communicator of our own, and what every rank's process is."""
    comm = mpi.COMM_WORLD.Dup()
    comm.Set_errhandler(mpi.ERRORS_RETURN)
    return comm, tuple(comm.allgather(Process.here()))


def _toward(processes: tuple[Process, ...]) -> str:
    """The host of rank 0, as all ranks reach it."""
    return "127.0.0.1" if len({process.host for process in processes}) == 1 else processes[0].host


def start_torch(group: "EPGroup") -> None:
    """Gives a group that mpiexec started a process group of torch too: gloo, and NCCL on GPUs. A collective.

    Raises CommTimeout and RankFailure where ranks do not meet.
    """
    job, size, timeout_s = group.communicator, group.world_size, group.timeout_s
    assert job is not None
    host, wait, name = _toward(job.processes), timedelta(seconds=timeout_s), job.name()

    def work() -> tuple[Store, dist.ProcessGroup]:
        """Rank 0's store is at a port of the system's choice, which the others hear of by MPI."""
        opened = dist.TCPStore(host, 0, size, True, wait, wait_for_workers=False) if job.rank == 0 else None  # type: ignore[attr-defined]
        port = job.comm.bcast(opened.port if opened is not None else None)
        store = opened or dist.TCPStore(host, port, size, False, wait)  # type: ignore[attr-defined]
        return store, connect(store, name, job.rank, size, group.device, timeout_s)

    store, process_group = job.watch.channel(name, group.members, timeout_s).run("start of torch", work)
    group.hold(Bond(job.watch, store, process_group, group.device))


def _leave_mpi(mpi: Any) -> None:
    """Finalises MPI as this process ends, once every rank is at its end; for as long as they live, that is waited for.

    After an error that nobody caught the job is aborted instead, as the others would wait for this rank.
    """
    if mpi.Is_finalized():
        return
    failed = any(job is None or job.watch.failure is not None for job in _met)
    alone = mpi.COMM_WORLD.Get_size() == 1
    sys.stdout.flush()
    if failed:
        time.sleep(GRACE_S)
    if getattr(sys, "last_value", None) is not None and not alone:
        mpi.COMM_WORLD.Abort(1)
    say_goodbye()  # to those who would wait for this rank, before it waits for them
    if not failed and (alone or _all_at_their_end(mpi)):
        mpi.Finalize()


def _all_at_their_end(mpi: Any) -> bool:
    """Waits until it is so; False where a process ended before."""
    with contextlib.suppress(mpi.Exception):
        request = mpi.COMM_WORLD.Ibarrier()
        while not request.Test():
            if any(process.has_ended() for job in _met if job is not None for process in job.processes):
                return bool(request.Test())  # it may have ended in good order
            time.sleep(LOOK_S)
        return True
    return False
