"""Ranks started by mpiexec for tests, each telling in a file what it saw.

    seen = mpiexec(4, "tests.comm.mpi_rank", "late", folder)     # [what rank 0 told, ...]

What MPICH leaves in /dev/shm when ranks are killed is taken away.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
MPIEXEC = which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
SHARED = Path("/dev/shm")

needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or MPIEXEC is None, reason="needs mpi4py and mpiexec: pip install 'crossdock[mpi]'"
)


@dataclass(frozen=True)
class Finished:
    """How an mpiexec ended: its exit code, what came out of it, and how long it took in seconds."""

    code: int
    out: str
    err: str
    seconds: float


@contextmanager
def no_leftovers() -> Iterator[None]:
    """Takes away the segments MPICH has made meanwhile, those that a running process has mapped aside."""
    before = set(SHARED.glob("mpich_shm_*"))
    try:
        yield
    finally:
        left = set(SHARED.glob("mpich_shm_*")) - before
        mapped = "".join(_maps(process) for process in Path("/proc").glob("[0-9]*")) if left else ""
        for segment in left:
            if segment.name not in mapped:
                segment.unlink(missing_ok=True)


def _maps(process: Path) -> str:
    try:
        return (process / "maps").read_text()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    """Kills a process and all that it started, stopped ones too."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            _kill(int(child))
    os.kill(pid, signal.SIGKILL)


def mpiexec(
    world_size: int, command: Sequence[str], options: Sequence[str] = (), timeout_s: float = 90.0, **environment: str
) -> Finished:
    """Runs `python command` on that many ranks. An mpiexec that does not end is killed and fails the test."""
    assert MPIEXEC is not None
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = [MPIEXEC, *options, "-n", str(world_size), sys.executable, *command]
    began = time.monotonic()
    with no_leftovers():
        process = subprocess.Popen(words, cwd=ROOT, env=kept | environment, text=True, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            out, err = process.communicate()
            pytest.fail(f"{' '.join(words)} did not end within {timeout_s:g} s:\n{out}\n{err}")
    return Finished(process.returncode, out, err, time.monotonic() - began)


def told(folder: Path, world_size: int) -> list[Any]:
    """What each rank saved; None for one that saved nothing."""
    files = [folder / f"{rank}.pt" for rank in range(world_size)]
    return [torch.load(file) if file.exists() else None for file in files]
