"""A process that is stopped answers nothing and closes nothing: the others name it all the same, in time, and end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launch import free_port

ROOT = Path(__file__).parents[2]


@contextmanager
def processes(world_size: int, mode: str) -> Iterator[list["subprocess.Popen[str]"]]:
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "error", "-m", "tests.comm.lost_rank", mode]  # a deprecated call is an error
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | shared | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(world_size)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def line(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


@pytest.mark.timeout(60)
def test_a_stopped_process_is_named_by_every_other() -> None:
    """Rank 0, which holds the store where all have met."""
    with processes(3, "until-lost") as ranks:
        for process in ranks:
            assert line(process) == {"ready": True}
        os.kill(ranks[0].pid, signal.SIGSTOP)
        began = time.monotonic()
        for rank in (1, 2):
            found = line(ranks[rank])
            assert found["kind"] == "RankFailure"
            assert f"rank {rank}: count: no sign of rank 0: gone or stuck" in found["message"]
            assert ranks[rank].wait(10) == 0
        assert time.monotonic() - began < 15


@pytest.mark.timeout(60)
def test_a_closed_group_leaves_no_threads_and_says_so() -> None:
    with processes(2, "once") as ranks:
        for rank, process in enumerate(ranks):
            assert [line(process) for _ in range(2)] == [{"ready": True}, {"threads_left": 0}]
            assert line(process) == {"closed": f"rank {rank}: the group of this transport is closed"}
            assert process.wait(10) == 0
