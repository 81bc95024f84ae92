"""The emulated cluster: nodes that crossdock tells apart, links that are slow between them, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from crossdock.cli.bench import cluster
from crossdock.cli.bench.cluster import Link, Shape, emulated_cluster, run_on_cluster
from crossdock.errors import ConfigError
from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]
TWO_BY_TWO = Shape(2, 2)


@pytest.fixture(scope="module")
def possible() -> None:
    """Skips where this machine cannot have a cluster: no Linux, no root, a container that may not make namespaces."""
    try:
        with emulated_cluster(Shape(1, 2), Link()):
            pass
    except ConfigError as error:
        pytest.skip(str(error))


def network_namespaces() -> set[str]:
    """Those that some process is in."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(link))
        except OSError:  # gone since
            continue
    return found


def left_of(folder: Path) -> set[str]:
    """Of the namespaces that ranks wrote into `folder`, those that still have a process 10 seconds later."""
    deadline = time.monotonic() + 10
    while True:
        left = network_namespaces() & {file.read_text().strip() for file in folder.iterdir()}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def noting(folder: Path, then: str) -> list[str]:
    """Ranks that leave a process behind that nobody waits for, write their namespace into `folder`, and do `then`."""
    note = f"readlink /proc/self/ns/net > {folder}/.$RANK; mv {folder}/.$RANK {folder}/$RANK"
    return ["sh", "-c", f"setsid sleep 1000 & {note}; {then}"]


@pytest.mark.usefixtures("possible")
def test_ranks_find_what_torchrun_would_have_set(tmp_path: Path) -> None:
    told = "$RANK $LOCAL_RANK $LOCAL_WORLD_SIZE $WORLD_SIZE $MASTER_ADDR $(hostname) $(pwd)"
    code = run_on_cluster(["sh", "-c", f'echo {told} > {tmp_path}/$RANK; getent hosts node1; echo "$0"', "x y"],
                          Shape(2, 3), Link())  # fmt: skip
    lines = [(tmp_path / str(rank)).read_text().split() for rank in range(6)]
    assert code == 0
    assert lines == [
        [str(rank), str(rank % 3), "3", "6", "10.0.0.1", f"node{rank // 3}", os.getcwd()] for rank in range(6)
    ]


@pytest.mark.usefixtures("possible")
def test_two_nodes_are_discovered_and_their_links_are_slow(capfd: pytest.CaptureFixture[str]) -> None:
    """80 MB/s at most where 640 Mbit/s are asked for; inside a node twice as much, however busy the machine is."""
    code = run_on_cluster([sys.executable, "-m", "crossdock.cli.bench.links"], TWO_BY_TWO, Link(rate_mbit=640))
    out, err = capfd.readouterr()
    assert (code, err) == (0, "") and out.startswith("4 ranks on 2 nodes")
    inside, between = (float(speed) for speed in re.findall(r"([0-9.]+) MB/s", out))
    assert between < 84 and inside > 2 * between, out


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("then", "code"), [("exit 0", 0), ("test $RANK = 1 && exit 3; sleep 100", 3)])
def test_nothing_is_left_after_success_and_error(
    tmp_path: Path, then: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_on_cluster(noting(tmp_path, then), TWO_BY_TWO, Link()) == code
    assert len({file.read_text() for file in tmp_path.iterdir()}) == 2
    assert left_of(tmp_path) == set()
    assert capfd.readouterr().err == ("error: rank 1 ended with exit code 3 and no message\n" if code else "")


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, "benchmarks/cluster.py", "2x2", "--", *noting(tmp_path, "sleep 100")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("[0-3]"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signum)  # the whole group, as Ctrl-C does
    _, err = process.communicate(timeout=20)
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum
        assert err == f"error: stopped by {signum.name}; all 4 ranks were ended\n"
    assert left_of(tmp_path) == set()


@pytest.mark.usefixtures("possible")
def test_a_network_that_cannot_be_is_one_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LIMIT", "64parsecs")
    before = network_namespaces()
    with pytest.raises(ConfigError, match=r"cannot have its network here.*64parsecs") as error:
        run_on_cluster(["true"], Shape(2, 1), Link())
    assert len(str(error.value).splitlines()) == 1 and network_namespaces() <= before


@pytest.mark.parametrize("text", ["", "2", "2x", "x2", "2x2x2", "0x2", "1x1", "-1x2", "2X2", "999x1", "2 x 2", "²x2"])
def test_a_shape_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=f"NODESxRANKS, such as 2x2, .* found {text!r}"):
        Shape.parse(text)


def test_a_shape() -> None:
    assert Shape.parse("3x4") == Shape(3, 4) and Shape.parse("1x2").ranks == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda patch: patch.setattr(cluster, "sys", SimpleNamespace(platform="darwin")), "needs Linux.*is darwin"),
        (lambda patch: patch.setattr(cluster.os, "geteuid", lambda: 1000), "needs root .* this is user 1000"),
        (lambda patch: patch.setattr(cluster.shutil, "which", lambda tool, path: None), "needs ip, tc, unshare, nsen"),
    ],
)
def test_where_there_can_be_none(
    run: Run, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None], message: str
) -> None:
    monkeypatch.setattr(cluster, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 0)
    break_it(monkeypatch)
    code, out, err = run("bench", "exchange", "--emulate", "2x2")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert re.search(message, err) and err.startswith("error: an emulated cluster")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--emulate", "2by2"], "found '2by2'"),
        (["--emulate", "2x2", "--ranks", "4"], "leave out --ranks"),
        (["--emulate", "2x2", "--rate-mbit", "0"], "a link's rate"),
        (["--ranks", "4", "--rate-mbit", "800"], "--rate-mbit is for --emulate"),
        (["--latency-us", "0"], "--latency-us is for --emulate"),
        (["--routing", "even"], "--routing must be one of random, skewed, found 'even'"),
    ],
)
def test_options_that_cannot_be(run: Run, options: list[str], message: str) -> None:
    code, out, err = run("bench", "exchange", *options)
    assert (code, out, len(err.splitlines())) == (1, "", 1) and message in err


def test_the_thin_command_says_what_is_wrong() -> None:
    def error_of(*words: str) -> str:
        command = [sys.executable, "benchmarks/cluster.py", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode and not done.stdout
        return done.stderr

    assert error_of("2x").startswith("error: a cluster is written NODESxRANKS")
    assert "expected a command behind --" in error_of("2x2", "--")
