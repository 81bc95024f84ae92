"""Real ranks that fail in every way there is: the others end in time, with one error, that names the right rank."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak_trial import judge
from tests.comm.failures import named, trial

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> str:
    """stdout of a python command, whatever its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
                          timeout=280, check=False)  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """All trials at once: most of their time is waiting."""
    lines = python("-m", "tests.comm.failures", "6").splitlines()
    return {found["name"]: found for found in map(json.loads, lines)}


@pytest.mark.parametrize("name", named())
def test_the_others_end_and_say_who(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes[name]
    assert not found["problems"], found["problems"] + found["events"]
    if name.startswith("killed"):  # noticed, not waited for
        assert max(found["delays_s"]) < 3.0
    if name.endswith("then on"):
        assert found["went_on"]


def test_a_dozen_at_random() -> None:
    """As `make soak`, which runs 200."""
    found = json.loads(python("benchmarks/soak.py", "--trials", "12", "--seed", "5", "--jobs", "4", "--transports",
                              "torch", "--json"))  # fmt: skip
    assert found["trials"] == 12 and not found["failed"], found["failed"]


LOSES = """
import os, sys
import benchmarks.soak as soak
def run_trial(trial):
    if trial.number == 1:
        os._exit({code})
    return soak.Outcome(trial)
soak.run_trial = run_trial
sys.argv = ["soak.py", "--trials", "4", "--transports", "torch", "--json"]
sys.exit(soak.main())
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_soak_that_lost_trials_fails(code: int) -> None:
    """A worker ends with the second trial, and with it the fourth is lost."""
    command = [sys.executable, "-c", LOSES.format(code=code)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["trials"] == 2 and not found["failed"]
    ended = ["worker 1 ended with exit code 3"] if code else []
    assert found["problems"] == [*ended, "no word of trial 1", "no word of trial 3"]


def error(rank: int, message: str, kind: str = "RankFailure", at: float = 1.0) -> dict[str, Any]:
    return {"event": "error", "rank": rank, "message": f"rank {rank}: plan: {message}", "kind": kind, "at": at}


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (error(2, "rank 1 is gone"), ""),
        (error(2, "rank 1 is gone (found by rank 0)"), ""),
        (error(2, "rank 0 is gone"), r"rank 2 names [0], expected of [1]"),
        (error(2, "rank 0, rank 1 are gone"), "rank 2 names [0, 1]"),
        (error(2, "somebody is gone"), "rank 2 names []"),
        (error(2, "rank 1 is late", kind="CommTimeout"), "rank 2 raised CommTimeout, expected RankFailure"),
        (error(2, "rank 1 is gone", at=100.0), "rank 2 raised after 100.0 s"),
        ({"event": "done", "rank": 2, "at": 1.0}, "rank 2 raised nothing"),
        ({"event": "wrong", "rank": 2, "message": "other values", "at": 1.0}, "rank 2: other values"),
    ],
)
def test_the_judge_sees_what_is_wrong(second: dict[str, Any], problem: str) -> None:
    killed = trial("killed", "plan", world_size=3)
    events = [error(0, "rank 1 is gone"), second]
    problems = judge(killed, events, {1: 0.0}, [], 0.0).problems
    assert any(problem in one for one in problems) if problem else not problems
    assert judge(killed, events, {1: 0.0}, [0], 0.0).hang
    assert "the fault did not happen" in judge(killed, events, {}, [], 0.0).problems


def test_the_judge_sees_who_did_not_go_on() -> None:
    killed = replace(trial("killed", "plan", world_size=3), recover=True)
    errors = [error(0, "rank 1 is gone"), error(2, "rank 1 is gone")]
    went_on = [{"event": "went on", "rank": rank, "members": [0, 2], "at": 2.0} for rank in (0, 2)]
    assert not judge(killed, errors + went_on, {1: 0.0}, [], 0.0).problems
    assert "rank 2 did not go on: no word" in judge(killed, errors + went_on[:1], {1: 0.0}, [], 0.0).problems
    alone = [*went_on[:1], {"event": "went on", "rank": 2, "members": [2], "at": 2.0}]
    assert "rank 2 went on with [2], expected [0, 2]" in judge(killed, errors + alone, {1: 0.0}, [], 0.0).problems
