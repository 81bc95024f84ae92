"""How the ranks of a soak trial are started: forked from this process, or by mpiexec. Each tells events on a pipe.

A further kind has `alive` (process ids by rank), `events` (a readable file descriptor), `reap` and `close`.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.soak_rank import Reporter, Trial, live, wait_for_threads
from crossdock.cli.launch import free_port
from crossdock.cli.mpi_side import find_mpiexec

Event = dict[str, Any]
SHARED = Path("/dev/shm")
SOAK = Path(__file__).with_name("soak.py")


class Forked:
    """Ranks that share this process's imports."""

    def __init__(self, trial: Trial) -> None:
        self.events, write = os.pipe()
        port = free_port()
        self.alive = {rank: self._fork(trial, rank, port, write) for rank in range(trial.world_size)}
        os.close(write)

    def _fork(self, trial: Trial, rank: int, port: int, write: int) -> int:
        pid = os.fork()
        if pid == 0:
            os.close(self.events)
            be_rank(trial, rank, port, write)
            os._exit(0)
        return pid

    def reap(self, events: list[Event]) -> None:
        """Takes those that have ended out of `alive`."""
        for rank, pid in list(self.alive.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self.alive[rank]

    def close(self) -> None:
        """Kills what is left."""
        for pid in self.alive.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(self.events)


class UnderMpiexec:
    """Ranks that mpiexec starts, each with an interpreter of its own; known to be there once they have said so."""

    def __init__(self, trial: Trial) -> None:
        self.segments = set(SHARED.glob("mpich_shm_*"))
        self.folder = Path(tempfile.mkdtemp(prefix="soak"))
        path = self.folder / "events"
        os.mkfifo(path)
        self.events = os.open(path, os.O_RDWR)  # a reader that sees no end while there is no writer
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        program = find_mpiexec()
        assert program is not None
        command = [program, "-disable-auto-cleanup", "-n", str(trial.world_size), sys.executable, str(SOAK)]
        self.job = subprocess.Popen([*command, "--as-rank", json.dumps(asdict(trial)), "--events", str(path)], env=kept,
                                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                    start_new_session=True)  # fmt: skip
        self.alive = dict.fromkeys(range(trial.world_size), self.job.pid)

    def reap(self, events: list[Event]) -> None:
        """Takes those that have ended, or said that they are about to, out of `alive`; learns process ids."""
        for event in events:
            if event["rank"] in self.alive:
                self.alive[event["rank"]] = event["pid"]
                if event["event"] == "ends" or not Path(f"/proc/{event['pid']}").exists():
                    del self.alive[event["rank"]]
        if self.job.poll() is not None:
            self.alive.clear()
        elif not self.alive:
            try:
                self.job.wait(10.0)
            except subprocess.TimeoutExpired:
                self.alive = {-1: self.job.pid}  # ranks that cannot end

    def close(self) -> None:
        """Kills what is left."""
        for pid in {*self.alive.values(), self.job.pid} if self.job.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.job.wait()
        _take_away(set(SHARED.glob("mpich_shm_*")) - self.segments)
        os.close(self.events)
        shutil.rmtree(self.folder)


def be_rank(trial: Trial, rank: int, port: int, write: int) -> None:
    """The whole life of a rank."""
    report = Reporter(rank, write)
    try:
        live(trial, rank, port, report)
        wait_for_threads()
    except BaseException as error:
        report("broken", message=f"{type(error).__name__}: {error}")
    report("ends")


def _take_away(segments: set[Path]) -> None:
    """Removes what MPICH leaves when ranks are killed, except what another job has mapped."""
    mapped = ""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mapped += (process / "maps").read_text()
    for segment in segments:
        if segment.name not in mapped:
            segment.unlink(missing_ok=True)
