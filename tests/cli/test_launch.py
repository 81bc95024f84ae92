"""The launcher: ranks end together, whatever happens to one of them; errors are told once; nothing is left running."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from crossdock.cli.launch import GRACE_S, Failure, _Ranks, cause, describe, rank_command, run_ranks
from crossdock.errors import ConfigError
from tests.cli.conftest import start

PREAMBLE = """
import os, signal, sys, time
from crossdock.cli.launch import RankSide
side = RankSide.from_environment()
rank = side.rank
"""


def ranks_of(body: str) -> list[str]:
    """The command of ranks that run `body`, which knows `side` and `rank`. Importing launch.py costs no torch."""
    return [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)]


def run(
    body: str, ranks: int, capfd: pytest.CaptureFixture[str], grace_s: float = GRACE_S
) -> tuple[int, str, str, float]:
    began = time.monotonic()
    code = run_ranks(ranks_of(body), ranks, grace_s=grace_s)
    out, err = capfd.readouterr()
    return code, out, err, time.monotonic() - began


def test_only_rank_0_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    print(rank, os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"])
    print("log of", rank, file=sys.stderr)
    """
    code, out, err, _ = run(body, 3, capfd)
    assert (code, out, err) == (0, "0 3 0 3\n", "log of 0\n")


def test_a_failed_rank_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 1:
        side.report("CheckpointError", "shard 2 is cut short", 1)
        sys.exit(1)
    time.sleep(100)
    """
    code, out, err, took = run(body, 3, capfd)
    assert (code, out, err) == (1, "", "error: rank 1: shard 2 is cut short\n")
    assert took < 10


def test_a_mistake_all_ranks_see_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err, _ = run("side.report('ConfigError', 'no such thing', 2); sys.exit(2)", 3, capfd)
    assert (code, out, err) == (2, "", "error: no such thing\n")


def test_the_cause_is_told_and_not_what_followed_from_it(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 1:
        time.sleep(0.4)
    side.report(*(("RankFailure", "rank 0: lost rank 1") if rank == 0 else ("ConfigError", "top_k is 9")), 1)
    sys.exit(1)
    """
    code, _, err, _ = run(body, 2, capfd, grace_s=20.0)
    assert (code, err) == (1, "error: rank 1: top_k is 9\n")


def test_a_rank_that_dies_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err, _ = run("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(100)", 2, capfd)
    assert code == 128 + 9 and err.startswith("error: rank 1 was killed by SIGKILL")
    body = "print('the last of it', file=sys.stderr); sys.exit(3) if rank == 1 else time.sleep(100)"
    code, _, err, _ = run(body, 2, capfd)
    assert code == 3 and "rank 1 ended with exit code 3 and no message; its last line was: the last of it" in err


def test_a_rank_that_hangs_and_ignores_sigterm_is_killed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    body = f"""
    if rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        time.sleep(100)
    while not os.path.exists({str(tmp_path / "pid")!r}):
        time.sleep(0.01)
    side.report("ConfigError", "bad", 1)
    sys.exit(1)
    """
    code, _, err, took = run(body, 2, capfd)
    assert (code, err) == (1, "error: rank 1: bad\n") and took < 15
    assert not alive([int((tmp_path / "pid").read_text())])


LAUNCHER = """
import sys
from crossdock.cli.launch import run_ranks
sys.exit(run_ranks([sys.executable, "-c", sys.argv[1]], 2))
"""


def launch_sleepers(tmp_path: Path) -> "tuple[subprocess.Popen[str], list[int]]":
    """A launcher in a process of its own, and the ids of its two ranks, which would sleep on."""
    body = f"""
side.watch_launcher()
open({str(tmp_path)!r} + f"/{{rank}}.tmp", "w").write(str(os.getpid()))
os.rename({str(tmp_path)!r} + f"/{{rank}}.tmp", {str(tmp_path)!r} + f"/{{rank}}")
time.sleep(100)
"""
    command = [sys.executable, "-c", LAUNCHER, PREAMBLE + body]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in files):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return launcher, [int(file.read_text()) for file in files]


def alive(pids: Sequence[int]) -> list[int]:
    """Which of the processes still run, zombies aside."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid, state in states.items() if state != "Z"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_its_launcher(tmp_path: Path, signum: signal.Signals) -> None:
    launcher, pids = launch_sleepers(tmp_path)
    os.kill(launcher.pid, signum)
    _, err = launcher.communicate(timeout=15)
    if signum == signal.SIGKILL:
        assert launcher.returncode == -9
    else:
        assert launcher.returncode == 128 + signum
        assert err == f"error: stopped by {signum.name}; all 2 ranks were ended\n"
    deadline = time.monotonic() + 10
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(pids) == []


def test_a_rank_of_another_launcher_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "--ranks", "4"]
    assert rank_command(words) == [sys.executable, "-m", "crossdock", *words]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="already"):
        rank_command(words)


def test_which_failure_is_told() -> None:
    first, second = (
        Failure(0, "CommTimeout", "rank 0: no word from rank 2", 1),
        Failure(2, "", "was killed by SIGSEGV", 139),
    )
    assert cause([first, second]) == second
    assert describe([first, second]) == "rank 2 was killed by SIGSEGV"
    assert describe([first]) == "rank 0: no word from rank 2"


def test_through_the_command_line(checkpoint: Path) -> None:
    """Every rank finds the model type unknown; it is said once."""
    (checkpoint / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 100}')
    began = time.monotonic()
    process = start("generate", str(checkpoint), "--prompt-ids", "5", "--ranks", "2", "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.count("error:") == 1 and "'gpt2'" in err and "Traceback" not in err
    assert time.monotonic() - began < 60


def test_a_rank_has_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ranks there are: with several threads bits would change with their number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = {_Ranks([], count, False)._environment(0, 1, 2)["OMP_NUM_THREADS"] for count in (1, 2, 4)}
    assert found == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _Ranks([], 2, False)._environment(0, 1, 2)["OMP_NUM_THREADS"] == "3"
