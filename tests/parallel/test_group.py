"""Joining: every variable that cannot work is named, and no port that stays silent is waited for without end."""

import math
import socket
import time

import pytest
import torch
import torch.distributed as dist

from crossdock.comm import make_transport
from crossdock.errors import CommTimeout, ConfigError
from crossdock.parallel import EPGroup, Topology, bounded, init, joining, meeting
from tests.launch import RankError, Ranks, free_port


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


def meets_at(monkeypatch: pytest.MonkeyPatch, host: str, port: int, rank: int = 1) -> None:
    for name, value in (MET | {"RANK": str(rank), "MASTER_ADDR": host, "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)


def test_a_port_that_accepts_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "GRACE_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        meets_at(monkeypatch, "127.0.0.1", port)
        began = time.monotonic()
        with pytest.raises(CommTimeout, match=f"rank 1: no answer from rank 0 at 127.0.0.1:{port} within 1 s"):
            init("cpu", timeout_s=1.0)
        assert time.monotonic() - began < 5


def test_a_port_nobody_listens_at_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    meets_at(monkeypatch, "127.0.0.1", port)
    with pytest.raises(CommTimeout, match=f"rank 1: no answer from rank 0 at 127.0.0.1:{port} within 0.5 s"):
        init("cpu", timeout_s=0.5)


def test_a_host_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    meets_at(monkeypatch, "no.such.host.invalid", 12345)
    with pytest.raises(ConfigError, match=r"the host 'no.such.host.invalid' is unknown"):
        init("cpu", timeout_s=5.0)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        meets_at(monkeypatch, "127.0.0.1", port, rank=0)
        with pytest.raises(ConfigError, match=f"rank 0: cannot meet the other ranks at 127.0.0.1:{port}: the port is"):
            init("cpu", timeout_s=5.0)


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "STAY_S", 0.0)
    port = free_port()
    meets_at(monkeypatch, "127.0.0.1", port, rank=0)
    with pytest.raises(CommTimeout, match=f"rank 0: rank 1 did not arrive within 0.5 s at 127.0.0.1:{port}"):
        init("cpu", timeout_s=0.5)


def test_a_topology_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    meets_at(monkeypatch, "127.0.0.1", 12345)
    with pytest.raises(ConfigError, match="topology must place 2 ranks, found one of 3"):
        init("cpu", topology=Topology((0, 0, 1)))


def test_a_process_group_is_needed_to_adopt_one() -> None:
    with pytest.raises(
        ConfigError, match=r"torch.distributed is not initialised in this process: use crossdock.init\(\)"
    ):
        EPGroup.from_process_group()


def adopted(group: EPGroup, nodes: tuple[int, ...]) -> tuple[object, ...]:
    """Ranks 1 and 3 exchange in a group of their own, made from one of an engine's; then the engine's works still."""
    theirs = dist.new_group([1, 3])
    found: tuple[object, ...] = ()
    if group.rank in (1, 3):
        with EPGroup.from_process_group(theirs, "cpu", 30.0, Topology(nodes)) as mine:
            transport = make_transport(mine)
            rows = transport.all_to_all_rows(torch.full((2, 1), float(group.rank)), [1, 1], [1, 1], "rows").wait()
            found = (mine.rank, mine.world_size, mine.topology.node_of_rank, rows.reshape(-1).tolist(),
                     transport.all_gather([group.rank], "gather"))  # fmt: skip
        told = torch.ones(1)
        dist.all_reduce(told, group=theirs)
        found += (told.item(),)
        dist.destroy_process_group(theirs)
    return (*found, make_transport(group).all_gather([group.rank], "after"))


def test_an_engine_that_has_begun_can_give_its_process_group(ranks_of_four: Ranks) -> None:
    everyone = [[0], [1], [2], [3]]
    found = ranks_of_four.run(adopted, (0, 1))
    assert found[0] == found[2] == (everyone,)
    for place, rank in enumerate((1, 3)):
        assert found[rank] == (place, 2, (0, 1), [1.0, 3.0], [[1], [3]], 2.0, everyone)


def disagreeing(group: EPGroup) -> None:
    EPGroup.from_process_group(None, "cpu", 20.0, Topology((0, group.rank)))


def test_adopting_ranks_must_agree_about_nodes(ranks_of_two: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1 was given nodes \[0, 1\], rank 0 \[0, 0\]") as caught:
        ranks_of_two.run(disagreeing)
    assert caught.value.kinds == {0: "ConfigError", 1: "ConfigError"}


def test_work_that_is_bounded() -> None:
    assert bounded(lambda: 7, 1.0) == 7
    with pytest.raises(KeyError, match="gone"):
        bounded(lambda: {}["gone"], 1.0)
    with pytest.raises(TimeoutError, match=r"not ended after 0.1 s"):
        bounded(lambda: time.sleep(1.0), 0.1)
