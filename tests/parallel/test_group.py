"""Joining: every variable that cannot work is named, and no port that stays silent is waited for without end."""

import math
import socket
import time

import pytest

from crossdock.errors import CommTimeout, ConfigError
from crossdock.parallel import EPGroup, bounded, group, init


def test_init_without_a_launcher_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init("cpu") as solo:
        assert (solo.rank, solo.world_size, solo.process_group) == (0, 1, None)
    assert EPGroup.solo().topology.num_nodes == 1


MET = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer, found 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, found 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK must be in 0..1 \(WORLD_SIZE is 2\), found 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT is not set"),
        (MET | {"MASTER_PORT": "abc"}, "MASTER_PORT must be an integer, found 'abc'"),
        (MET | {"MASTER_PORT": "99999"}, r"MASTER_PORT must be in 1..65535, found 99999"),
        (MET | {"MASTER_PORT": "0"}, r"MASTER_PORT must be in 1..65535, found 0"),
    ],
)
def test_init_names_a_bad_variable(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], names: str) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=names):
        init("cpu")


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_a_timeout_that_bounds_nothing_is_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="timeout_s must be above 0 seconds and at most 1e\\+09, found"):
        init("cpu", timeout_s)


def test_a_port_that_accepts_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "GRACE_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        for name, value in (MET | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        with pytest.raises(CommTimeout, match=f"rank 1: the 2 ranks did not all arrive at 127.0.0.1:{port} within 1 s"):
            init("cpu", timeout_s=1.0)
        assert time.monotonic() - began < 5


def test_work_that_is_bounded() -> None:
    assert bounded(lambda: 7, 1.0) == 7
    with pytest.raises(KeyError, match="gone"):
        bounded(lambda: {}["gone"], 1.0)
    with pytest.raises(TimeoutError, match=r"not ended after 0.1 s"):
        bounded(lambda: time.sleep(1.0), 0.1)
