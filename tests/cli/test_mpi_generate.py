"""`crossdock generate` under mpiexec: one answer, the bits of one rank; one error, and the job ends."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crossdock.cli import mpi_side
from crossdock.cli.doctor import examine
from crossdock.cli.launch import rank_command, run_ranks, under_launcher
from crossdock.errors import ConfigError
from tests.mpi import ROOT, mpiexec, needs_mpi, no_leftovers

pytestmark = pytest.mark.timeout(150)
OPTIONS = ["generate", "--json", "--dtype", "float32", "--max-new-tokens", "8"]
# Rank 1 loads no model: something happens to it there.
SABOTAGE = """
import os, signal, sys
import crossdock.cli
if os.environ["PMI_RANK"] == "1":
    import crossdock.models.registry
    from crossdock.errors import CheckpointError
    def load_model(*_, **__):
        {what}
    crossdock.models.registry.load_model = load_model
sys.exit(crossdock.cli.main({words}))
"""


def alone(*command: str) -> dict[str, Any]:
    """The JSON of a process that mpiexec did not start."""
    with no_leftovers():
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
                              check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return alone("-m", "crossdock", *OPTIONS, "--ranks", "1")


@needs_mpi
def test_mpiexec_gives_the_bits_of_one_rank(one_rank: dict[str, Any]) -> None:
    done = mpiexec(4, ["-m", "crossdock", *OPTIONS])
    assert (done.code, done.err) == (0, ""), done
    answer = json.loads(done.out)
    assert (answer["ranks"], answer["transport"], len(answer["expert_load"]["per_rank"])) == (4, "mpi", 4)
    assert answer["logits_digest"] == one_rank["logits_digest"] and answer["outputs"] == one_rank["outputs"]


@needs_mpi
def test_ranks_of_the_transport_mpi_are_started_by_mpiexec(one_rank: dict[str, Any]) -> None:
    words = [*OPTIONS, "--ranks", "2", "--transport", "mpi"]
    launch = f"from crossdock.cli.launch import *; run_ranks(rank_command({words}), 2, transport='mpi')"
    answer = alone("-c", launch)
    assert (answer["ranks"], answer["transport"]) == (2, "mpi")
    assert answer["logits_digest"] == one_rank["logits_digest"]


@needs_mpi
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--frobnicate"], 2, "error: No such option: --frobnicate"),
        (["/nowhere", "--prompt-ids", "5"], 1, "/nowhere must be a directory with a config.json, found nothing"),
        (["--ranks", "3"], 1, "cannot be used under mpiexec, which has already (3 of them)"),
    ],
)
def test_a_mistake_all_ranks_make_is_told_once(words: list[str], code: int, message: str) -> None:
    done = mpiexec(3, ["-m", "crossdock", "generate", "--json", *words])
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1), done
    assert done.err.startswith("error: ") and message in done.err


@needs_mpi
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise CheckpointError('shard 2 is cut short')", "error: rank 1: shard 2 is cut short"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "error: rank 0: plan of exchange 1 in MoE layer 0: no sign of rank 1"),
    ],
)
def test_what_happens_to_one_rank_is_told_once_and_ends_the_job(what: str, message: str) -> None:
    done = mpiexec(2, ["-c", SABOTAGE.format(what=what, words=[*OPTIONS, "--timeout", "5"])])
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1), done
    assert done.err.startswith(message) and done.seconds < 60, done  # mpiexec may lose the end of the line


@needs_mpi
def test_doctor_knows_the_library() -> None:
    found = examine()["transports"]["mpi"]
    assert found["available"] and found["why"].startswith("MPI") and "mpiexec" in found["why"], found


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    found = examine()["transports"]["mpi"]
    assert found == {"available": False, "why": "needs mpi4py: pip install 'crossdock[mpi]'"}


def test_which_launcher_started_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not under_launcher()
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert under_launcher() and mpi_side.mpiexec_place() == (1, 4)
    with pytest.raises(ConfigError, match="under mpiexec"):
        rank_command(["generate", "--ranks", "2"])
    monkeypatch.setenv("RANK", "0")  # torchrun inside such a job
    assert mpi_side.mpiexec_place() is None


def test_ranks_of_the_transport_mpi_need_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_side, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"transport 'mpi' needs mpi4py: pip install 'crossdock\[mpi\]'"):
        run_ranks(["true"], 2, transport="mpi")
    monkeypatch.setattr(mpi_side, "find_spec", lambda name: name)
    monkeypatch.setattr(mpi_side, "find_mpiexec", lambda: None)
    with pytest.raises(ConfigError, match=f"needs mpiexec, found none in {Path(sys.executable).parent} nor on PATH"):
        run_ranks(["true"], 2, transport="mpi")
