"""Do ranks that lose one another always end, in time, and name the right one? Real processes, killed at random moments.

    make soak                                      200 trials
    python benchmarks/soak.py --trials 20 --seed 7 --transports torch --json

Each trial starts 3 or 4 ranks that exchange and check what arrives, and makes one or two of them fail: killed, stopped,
late, raising, leaving, disagreeing; at a named point of an exchange or at any moment. Every other rank must raise the
right class of error, naming a rank that failed, within the timeout and GRACE_S, and its process must be able to end.
Some go on without the lost rank, and must compute what it did. Trial n of a seed is always the same: run a failed one
again with --only n. Ranks are forked from this process, which has torch imported and no thread.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch writes pages about connections that broke

import torch

from benchmarks.soak_rank import POINTS, Trial
from benchmarks.soak_start import be_rank
from benchmarks.soak_trial import Outcome, run_trial
from crossdock.cli.mpi_side import find_mpiexec

TIMEOUT_S = 4.0
SHARES = {"torch": 8, "symmetric": 4, "mpi": 1}  # of the trials; ranks under mpiexec take seconds to start
POINTED = ("killed", "stopped", "stopped briefly", "late", "late a little", "error", "abort", "leaves", "bad id")
OUTSIDE = ("killed", "killed", "killed", "stopped", "stopped briefly", "killed in recovery", "killed at start",
           "stopped at start")  # fmt: skip
AT_START = ("other width", "other world", "other nodes", "never comes")
WEIGHTS = {"killed": 8, "stopped": 2, "stopped briefly": 3, "late": 2, "late a little": 4, "error": 4, "abort": 4,
           "leaves": 3, "bad id": 3}  # fmt: skip


def transports() -> dict[str, str]:
    """Those there are, and for each why it cannot be soaked here; empty where it can."""
    mpiexec = find_mpiexec() if find_spec("mpi4py") else None
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout if mpiexec else ""
    without_mpi = "" if "HYDRA" in version else "needs mpi4py and MPICH's mpiexec: pip install 'crossdock[mpi]'"
    return {"torch": "", "symmetric": "" if find_spec("triton") else "needs triton", "mpi": without_mpi}


def draw(seed: int, number: int, names: list[str]) -> Trial:
    """Trial `number` of a seed."""
    dice = random.Random(f"{seed} {number}")
    name = dice.choices(names, [SHARES[one] for one in names])[0]
    kind = dice.choices(("pointed", "outside", "start"), (6, 0, 0) if name == "mpi" else (6, 3, 1))[0]
    if kind == "pointed":
        fault = dice.choices(POINTED, [WEIGHTS[name] for name in POINTED])[0]
        point, step = dice.choice(POINTS), dice.randrange(10)
    elif kind == "outside":
        fault, point, step = dice.choice(OUTSIDE), "any moment", -1
    else:
        fault, point, step = dice.choice(AT_START), "start", -1
    world_size = 4 if fault == "killed in recovery" else dice.choice((3, 4))
    hierarchy = "node" if world_size == 4 and dice.random() < 0.5 else "flat"
    victims = [dice.randrange(world_size)]
    if fault == "killed in recovery" or (fault == "killed" and world_size == 4 and dice.random() < 0.25):
        victims.append((victims[0] + 2) % 4)
    delay_s = {"late": TIMEOUT_S + dice.uniform(1.0, 2.0)}.get(fault, dice.uniform(0.1, 0.6))
    can_recover = fault in ("killed", "stopped", "late", "abort", "leaves", "killed in recovery")
    recover = can_recover and (fault == "killed in recovery" or dice.random() < 0.4)
    order = tuple(victims)
    return Trial(number, name, world_size, hierarchy, fault, order, point, step, delay_s, recover, TIMEOUT_S)


def run_all(seed: int, numbers: list[int], names: list[str], jobs: int, problems: list[str]) -> Iterator[Outcome]:
    """Outcomes as they come, of `jobs` trials at a time: most of a trial is waiting. `problems`: what is missing."""
    unheard = set(numbers)
    read, write = os.pipe()
    leaders = []
    for job in range(jobs):
        leader = os.fork()
        if leader == 0:
            os.close(read)
            with os.fdopen(write, "wb", buffering=0) as out:
                for number in numbers[job::jobs]:
                    out.write(json.dumps(asdict(run_trial(draw(seed, number, names)))).encode() + b"\n")
            os._exit(0)
        leaders.append(leader)
    os.close(write)
    with os.fdopen(read) as lines:
        for line in lines:
            outcome = Outcome.heard(json.loads(line))
            unheard.discard(outcome.trial.number)
            yield outcome
    codes = [os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]) for leader in leaders]
    problems += [f"worker {job} ended with exit code {code}" for job, code in enumerate(codes) if code]
    problems += [f"no word of trial {number}" for number in sorted(unheard)]


def summary(outcomes: list[Outcome], problems: list[str]) -> dict[str, object]:
    """What is printed at the end, and with --json instead of it; `problems` are the soak's own."""
    kinds = {}
    for fault in sorted({outcome.trial.fault for outcome in outcomes}):
        of_kind = [outcome for outcome in outcomes if outcome.trial.fault == fault]
        kinds[fault] = {
            "trials": len(of_kind),
            "errors": sum(len(outcome.delays_s) for outcome in of_kind),
            "slowest_s": round(max((max(outcome.delays_s, default=0.0) for outcome in of_kind), default=0.0), 2),
            "went_on": sum(outcome.went_on for outcome in of_kind),
            "failed": sum(bool(outcome.problems) for outcome in of_kind),
        }
    per_transport = {
        name: sum(outcome.trial.transport == name for outcome in outcomes)
        for name in sorted({outcome.trial.transport for outcome in outcomes})
    }
    return {
        "trials": len(outcomes),
        "timeout_s": TIMEOUT_S,
        "transports": per_transport,
        "hangs": sum(outcome.hang for outcome in outcomes),
        "wrong_names": sum("names" in problem for outcome in outcomes for problem in outcome.problems),
        "kinds": kinds,
        "problems": problems,
        "failed": [{"trial": outcome.trial.number, "fault": outcome.trial.fault, "problems": outcome.problems}
                   for outcome in outcomes if outcome.problems],
    }  # fmt: skip


def show(found: dict[str, object], seed: int, names: list[str]) -> None:
    kinds: dict[str, dict[str, object]] = found["kinds"]  # type: ignore[assignment]
    print(f"{'fault':20}{'trials':>8}{'errors':>8}{'slowest s':>11}{'went on':>9}{'failed':>8}")
    for fault, row in kinds.items():
        print(f"{fault:20}{row['trials']:>8}{row['errors']:>8}{row['slowest_s']:>11}{row['went_on']:>9}"
              f"{row['failed']:>8}")  # fmt: skip
    print(f"{found['trials']} trials over {found['transports']}, timeout {found['timeout_s']} s: "
          f"{found['hangs']} hangs, {found['wrong_names']} wrong names")  # fmt: skip
    for problem in found["problems"]:  # type: ignore[attr-defined]
        print(problem)
    for failed in found["failed"]:  # type: ignore[attr-defined]
        print(
            f"trial {failed['trial']} ({failed['fault']}), again with "
            f"--transports {','.join(names)} --seed {seed} --only {failed['trial']}:"
        )
        for problem in failed["problems"]:
            print(f"    {problem}")


def main() -> int:
    known = transports()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this one trial of the seed, and show what its ranks say")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--transports", default=",".join(name for name, why in known.items() if not why))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)  # what mpiexec starts
    parser.add_argument("--events", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.as_rank:
        told = json.loads(options.as_rank)
        trial = Trial(**told | {"victims": tuple(told["victims"])})
        be_rank(trial, int(os.environ["PMI_RANK"]), 0, os.open(options.events, os.O_WRONLY))
        return 0
    names = options.transports.split(",")
    for name in names:
        if known.get(name, "no such transport"):
            parser.error(f"transport {name}: {known.get(name, 'no such transport')}")
    numbers = [options.only] if options.only is not None else list(range(options.trials))
    outcomes: list[Outcome] = []
    problems: list[str] = []
    for outcome in run_all(options.seed, numbers, names, min(options.jobs, len(numbers)), problems):
        outcomes.append(outcome)
        failed = sum(bool(one.problems) for one in outcomes)
        print(f"{chr(13)}{len(outcomes)}/{len(numbers)} trials, {failed} failed ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if options.only is not None and outcomes:
        print(outcomes[0].trial, *outcomes[0].events, sep="\n")
    found = summary(sorted(outcomes, key=lambda outcome: outcome.trial.number), problems)
    if options.json:
        print(json.dumps(found))
    else:
        show(found, options.seed, names)
    return int(bool(found["failed"] or problems))


if __name__ == "__main__":
    sys.exit(main())
