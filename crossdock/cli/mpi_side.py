"""Ranks and mpiexec, as the command line sees them: a rank that mpiexec started, and mpiexec started for `--ranks`.

Under mpiexec nobody of ours stands above the ranks, so they arrange among themselves what our launcher does elsewhere:
only rank 0 has a stdout, the first rank of a machine to fail says so and the others keep silent, and whoever fails ends
the job, as the others would wait for it.
"""

import contextlib
import faulthandler
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from crossdock.errors import ConfigError

PLACES = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))  # of MPICH, of Open MPI
OURS = "CROSSDOCK_MPIEXEC"  # set where we started mpiexec
CONSEQUENCES = ("RankFailure", "CommTimeout")  # errors that another rank's failure brings about
GRACE_S = 1.0  # how long a rank with such an error leaves the word to the one that caused it
WRONG_WORDS = 2  # the exit code of mistakes on the command line, which all ranks make
ABORT_S = 30.0  # how long ending the job may take; before MPI has started, all ranks have to come to that first


def mpiexec_place() -> tuple[int, int] | None:
    """(rank, size) where mpiexec, and not torchrun, started this process as one of several ranks."""
    for rank, size in PLACES:
        values = os.environ.get(rank, ""), os.environ.get(size, "")
        if "RANK" not in os.environ and all(value.isdecimal() for value in values) and int(values[1]) > 1:
            return int(values[0]), int(values[1])
    return None


@dataclass
class MpiSide:
    """This process as a rank of mpiexec's; `ours` where `--ranks` started that."""

    rank: int
    ours: bool
    claims: list[socket.socket] = field(default_factory=list)

    @classmethod
    def from_environment(cls) -> "MpiSide | None":
        """None in a process that mpiexec did not start."""
        ours = os.environ.pop(OURS, None) is not None
        place = mpiexec_place()
        return None if place is None else cls(place[0], ours)

    def settle(self) -> None:
        """Leaves stdout to rank 0. hydra tells ranks by SIGUSR1 that one has died, which would end them."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if self.rank:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def report(self, kind: str, text: str, code: int) -> NoReturn:
        """Prints an error, unless another rank of this machine has, and ends the job."""
        if kind in CONSEQUENCES:
            time.sleep(GRACE_S)
        if code == WRONG_WORDS and self.rank == 0:
            print(f"error: {text}", file=sys.stderr)
        elif code != WRONG_WORDS and self._is_first():
            whose = "" if text.startswith("rank ") else f"rank {self.rank}: "
            sys.stderr.write(f"error: {whose}{text}\n")  # at once: what comes after may not be passed on
        self.end_job(code)

    def _is_first(self) -> bool:
        """Whether no other rank on this machine asked before; where that cannot be told, True."""
        claim = socket.socket(socket.AF_UNIX)
        self.claims.append(claim)  # holds for as long as this process lives
        try:
            claim.bind(f"\0crossdock error below {os.getppid()}")  # the ranks of one machine have one parent
        except OSError:
            return sys.platform != "linux"  # elsewhere there are no such names
        return True

    def end_job(self, code: int) -> NoReturn:
        """Ends every rank with this exit code; this one alone where that cannot be done, or each does so by itself."""
        sys.stdout.flush()
        sys.stderr.flush()
        if code == WRONG_WORDS:
            os._exit(code)
        quiet = open(os.devnull, "w")  # noqa: SIM115, the process ends with it
        faulthandler.dump_traceback_later(ABORT_S, exit=True, file=quiet)  # works while MPI holds Python's lock, too
        with contextlib.suppress(ImportError, RuntimeError):
            launch = sys.modules.get("crossdock.parallel.mpi_launch")
            if launch is not None and launch.start_is_pending():
                os._exit(code)
            from mpi4py import MPI

            if not MPI.Is_initialized():
                MPI.Init()  # with all ranks: they come to it, or fail and come here
            os.dup2(quiet.fileno(), 2)  # MPI would add a line of its own
            _drop_segments()
            MPI.COMM_WORLD.Abort(code)
        os._exit(code)


def _drop_segments() -> None:
    """Takes away the names of the shared memory that MPICH made for this job, and does not when it is aborted."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            _, found, name = line.partition(" /dev/shm/mpich_shm_")
            if found:
                Path(f"/dev/shm/mpich_shm_{name}").unlink(missing_ok=True)


def find_mpiexec() -> str | None:
    """The mpiexec of this Python's environment, else the one on PATH."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which("mpiexec", path=os.pathsep.join(places))


def exec_mpiexec(command: Sequence[str], ranks: int, threads: int) -> NoReturn:
    """This process becomes the mpiexec of `ranks` ranks. Raises ConfigError where there is none, or no mpi4py."""
    if find_spec("mpi4py") is None:
        raise ConfigError("transport 'mpi' needs mpi4py: pip install 'crossdock[mpi]'")
    mpiexec = find_mpiexec()
    if mpiexec is None:
        where = Path(sys.executable).parent
        raise ConfigError(f"--ranks with transport 'mpi' needs mpiexec, found none in {where} nor on PATH")
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {OURS: "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(mpiexec, [mpiexec, "-n", str(ranks), *command], environment)
