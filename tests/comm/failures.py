"""The trials of `test_failures.py`: every kind of failure, at every point of an exchange. Prints JSON lines.

A process of its own, since ranks are forked: the one that runs the tests may have threads.
"""

import json
import os
import sys
from dataclasses import asdict

os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.soak_rank import POINTS, Trial
from benchmarks.soak_trial import run_trial

TIMEOUT_S = 6.0  # of which little is needed, except on a busy machine
STEP = 3


def trial(fault: str, point: str, hierarchy: str = "flat", victims: tuple[int, ...] = (1,), recover: bool = False,
          world_size: int = 4) -> Trial:  # fmt: skip
    delay_s = TIMEOUT_S + 1.5 if fault == "late" else 0.3
    return Trial(0, "torch", world_size, hierarchy, fault, victims, point, STEP, delay_s, recover, TIMEOUT_S)


def named() -> dict[str, Trial]:
    """The trials by the names that tests give them."""
    killed = {f"killed at {point}": trial("killed", point, world_size=3) for point in POINTS}
    over_nodes = {f"killed at {point}, nodes": trial("killed", point, "node") for point in ("dispatch", "in backward")}
    others = {
        "rank 0 killed, then on": trial("killed", "experts", victims=(0,), recover=True),
        "two killed, then on": trial("killed", "combine", victims=(0, 2), recover=True),
        "two neighbours killed": trial("killed", "plan", victims=(1, 2)),
        "stopped, then on": trial("stopped", "under way", victims=(0,), recover=True),
        "stopped over nodes": trial("stopped", "dispatch", "node", victims=(3,)),
        "stopped briefly": trial("stopped briefly", "combine", "node"),
        "late": trial("late", "experts", world_size=3),
        "late over nodes, then on": trial("late", "backward", "node", recover=True),
        "late a little": trial("late a little", "in backward"),
        "error": trial("error", "in backward", "node"),
        "abort, then on": trial("abort", "dispatch", victims=(2,), recover=True),
        "leaves": trial("leaves", "combine", victims=(0,)),
        "bad id": trial("bad id", "plan", "node"),
        "other width": trial("other width", "start", victims=(2,)),
        "other world": trial("other world", "start", victims=(2,), world_size=3),
        "other nodes": trial("other nodes", "start", victims=(0,)),
        "never comes": trial("never comes", "start", victims=(1,), world_size=3),
        "rank 0 never comes": trial("never comes", "start", victims=(0,), world_size=3),
    }
    return killed | over_nodes | others


def main(jobs: int) -> None:
    torch.set_num_threads(1)
    todo = list(named().items())
    leaders = []
    for job in range(jobs):
        leader = os.fork()
        if leader == 0:
            for name, one in todo[job::jobs]:
                line = json.dumps({"name": name} | asdict(run_trial(one))) + "\n"
                os.write(1, line.encode())
            os._exit(0)
        leaders.append(leader)
    for leader in leaders:
        os.waitpid(leader, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
