"""Starts N ranks of one command on this machine, and sees to it that they end together.

Each rank is a process of its own with the variables torchrun would set. Rank 0 writes to our stdout and stderr; the
others' output is kept aside and only its end is shown, when such a rank dies without a word.

    launcher ----stdin (never written, closes when we die)----> rank r   a rank whose stdin ends leaves at once
    launcher <---report pipe, one JSON line an error----------- rank r   so each error is printed once, the cause first

Rejected: torch.multiprocessing (imports torch in the launcher and unpickles there), and PDEATHSIG, which exists on
Linux only and is bound to a thread.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import IO, Any

from crossdock.cli.mpi_side import CONSEQUENCES, exec_mpiexec, mpiexec_place
from crossdock.errors import ConfigError

REPORT_FD = "CROSSDOCK_REPORT_FD"
GRACE_S = 1.0  # how long the other ranks may still report after the first failure, so that the cause is known
STOP_S = 3.0  # how long a rank may take to end after SIGTERM before it is killed
# Of a rank on a CPU unless OMP_NUM_THREADS says otherwise: ranks are what uses more cores. With several threads the
# last bits of products change with their number, and where cores are shared, threads that spin for one another stall.
RANK_THREADS = 1
FIRST_PORT, PORTS, TRIES = 20000, 12000, 1000  # Linux gives connections those from 32768 on
LONGEST_REPORT = 3000  # bytes of text; with its frame it stays below PIPE_BUF, so that ranks never interleave


@dataclass(frozen=True)
class Failure:
    """How one rank failed. `kind` is the exception's class name, "" where the process died without reporting."""

    rank: int
    kind: str
    text: str
    code: int


@dataclass(frozen=True)
class RankSide:
    """The launcher as seen from a rank that it started."""

    rank: int
    report_fd: int

    @classmethod
    def from_environment(cls) -> "RankSide | None":
        """None in a process that no launcher of ours started."""
        value = os.environ.pop(REPORT_FD, None)  # popped: what this rank starts is not a rank
        return None if value is None else cls(int(os.environ["RANK"]), int(value))

    def watch_launcher(self) -> None:
        """From now on this process ends when the launcher does, however the launcher ended."""

        def wait() -> None:
            while os.read(0, 1):
                pass
            os._exit(1)

        threading.Thread(target=wait, name="launcher-watch", daemon=True).start()

    def report(self, kind: str, text: str, code: int) -> None:
        """Hands an error to the launcher, which prints it."""
        text = text.encode()[:LONGEST_REPORT].decode(errors="ignore")
        line = json.dumps(asdict(Failure(self.rank, kind, text, code)), ensure_ascii=False) + "\n"
        os.write(self.report_fd, line.encode())


def under_launcher() -> bool:
    """Whether torchrun, mpiexec or our own launcher started this process as one of several ranks."""
    return ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or mpiexec_place() is not None


def rank_command(argv: Sequence[str]) -> list[str]:
    """The command of each rank: this program again with the same words (a rank of ours pays no heed to `--ranks`).

    Raises ConfigError where this process is itself a rank of another launcher.
    """
    if under_launcher():
        place = mpiexec_place()
        who = (
            f"mpiexec, which has already ({place[1]} of them)"
            if place
            else (f"torchrun, which has already (RANK={os.environ['RANK']}, WORLD_SIZE={os.environ['WORLD_SIZE']})")
        )
        raise ConfigError(f"--ranks starts the ranks itself and cannot be used under {who}")
    return [sys.executable, "-m", "crossdock", *argv]


def run_ranks(
    command: Sequence[str], ranks: int, *, debug: bool = False, transport: str = "auto", grace_s: float = GRACE_S
) -> int:
    """Runs `command` on `ranks` ranks and returns the exit code: 0, a failed rank's, or 128 + the signal that came.

    Returns only when no rank is left. Prints one line on stderr where a rank failed. Ranks of the transport "mpi" are
    started by mpiexec, which takes the place of this process.
    """
    if transport == "mpi":
        exec_mpiexec(command, ranks, RANK_THREADS)
    with _Ranks(command, ranks, debug) as running:
        return running.wait(grace_s)


class _Ranks:
    """The processes of one launch."""

    def __init__(self, command: Sequence[str], ranks: int, debug: bool) -> None:
        self.command, self.count, self.debug = list(command), ranks, debug
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[IO[bytes] | None] = []
        self.failures: list[Failure] = []
        self.signal = 0
        self.pending = b""

    def __enter__(self) -> "_Ranks":
        self.handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        self.report_read, report_write = os.pipe()
        lifeline_read, self.lifeline = os.pipe()
        port = free_port()
        for rank in range(self.count):
            aside = None if rank == 0 or self.debug else tempfile.TemporaryFile()
            self.logs.append(aside)
            self.processes.append(
                subprocess.Popen(
                    self.command,
                    env=self._environment(rank, port, report_write),
                    stdin=lifeline_read,
                    stdout=None if rank == 0 else aside or sys.stderr.fileno(),
                    stderr=aside,
                    pass_fds=(report_write,),
                    start_new_session=True,  # Ctrl-C reaches us alone, and we end the ranks
                )
            )
        os.close(report_write)
        os.close(lifeline_read)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for fd in (self.report_read, self.lifeline):
            os.close(fd)
        for log in self.logs:
            if log is not None:
                log.close()
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _environment(self, rank: int, port: int, report_write: int) -> dict[str, str]:
        threads = os.environ.get("OMP_NUM_THREADS") or str(RANK_THREADS)
        return os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.count),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
            REPORT_FD: str(report_write),
        }

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signal = signum

    def wait(self, grace_s: float) -> int:
        """Until all ranks are done, one has failed, or a signal came."""
        deadline = float("inf")
        while not self.signal and time.monotonic() < deadline:
            self._read_reports(0.05)
            exits = [process.poll() for process in self.processes]
            if any(exits) or self.failures:
                deadline = min(deadline, time.monotonic() + grace_s)
            if None not in exits:
                break
        if self.signal:
            self.stop()
            name = signal.Signals(self.signal).name
            print(f"error: stopped by {name}; all {self.count} ranks were ended", file=sys.stderr)
            return 128 + self.signal
        self._read_reports(0.0)
        silent = self._silent_deaths()
        self.stop()
        failures = self.failures + silent
        if not failures:
            return 0
        print(f"error: {describe(failures)}", file=sys.stderr)
        return cause(failures).code

    def _read_reports(self, timeout_s: float) -> None:
        while select.select([self.report_read], [], [], timeout_s)[0]:
            chunk = os.read(self.report_read, 65536)
            if not chunk:  # every rank has closed its end, so this pipe stays readable: wait by the clock
                time.sleep(timeout_s)
                return
            *lines, self.pending = (self.pending + chunk).split(b"\n")
            self.failures += [Failure(**json.loads(line)) for line in lines]
            timeout_s = 0.0

    def _silent_deaths(self) -> list[Failure]:
        """The ranks that ended badly and did not say why."""
        told = {failure.rank for failure in self.failures}
        dead = [(r, p.returncode) for r, p in enumerate(self.processes) if r not in told and p.poll()]
        return [
            Failure(rank, "", _exit_text(code) + self._last_words(rank), code if code > 0 else 128 - code)
            for rank, code in dead
        ]

    def _last_words(self, rank: int) -> str:
        log = self.logs[rank]
        if log is None:
            return ""
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
        return f"; its last line was: {lines[-1].strip()[:500]}" if lines else ""

    def stop(self) -> None:
        """Ends every rank that still runs: asked to first, then killed; waits for each."""
        left = [process for process in self.processes if process.poll() is None]
        _signal_groups(left, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while any(process.poll() is None for process in left) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = [process for process in left if process.poll() is None]
        _signal_groups(left, signal.SIGKILL)
        for process in left:
            process.wait()


def cause(failures: Sequence[Failure]) -> Failure:
    """The failure that came first among those that another rank's failure does not explain."""
    return min(failures, key=lambda failure: failure.kind in CONSEQUENCES)


def describe(failures: Sequence[Failure]) -> str:
    """One line: the cause, with its rank unless several ranks say the very same, as they do of a bad option."""
    first = cause(failures)
    shared = sum(failure.text == first.text for failure in failures) > 1
    if first.kind == "" and first.code:
        return f"rank {first.rank} {first.text}"
    return first.text if shared or first.text.startswith("rank ") else f"rank {first.rank}: {first.text}"


def cores() -> int:
    """CPU cores this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _signal_groups(processes: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)  # each rank leads its own process group, so its children go too


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and no message"
    hint = " (out of memory is the usual reason)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def free_port() -> int:
    """A port of the loopback that nobody uses at this moment, and below those that the system gives to connections."""
    for _ in range(TRIES):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", FIRST_PORT + secrets.randbelow(PORTS)))
            return int(probe.getsockname()[1])
    raise ConfigError(f"found no free port of the loopback in {TRIES} tries from {FIRST_PORT} on")
