"""Joining: every variable that cannot work is named, and no port that stays silent is waited for without end."""

import inspect
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from crossdock.cli import mpi_side
from crossdock.cli.launch import run_ranks
from crossdock.cli.runtime import join_ranks
from crossdock.comm import make_transport
from crossdock.errors import CommTimeout, ConfigError, CrossdockError, PlanMismatch, RankFailure
from crossdock.parallel import EPGroup, Topology, bounded, init, joining, meeting, mpi_launch
from crossdock.parallel import group as group_module
from crossdock.parallel.group import is_failure
from crossdock.parallel.meeting import Arrival, Card, Listener, meet
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


def adopted_again(group: EPGroup) -> list[tuple[int, list[list[int]]]]:
    """Ranks 1 and 3, one of which is in a group of its own, give theirs three times over, once in the other order."""
    theirs = [dist.new_group([1, 3]), dist.new_group([1, 3])]
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:
        theirs.append(dist.new_group([3, 1], sort_ranks=False))
    alone = [dist.new_group([1], use_local_synchronization=True)] if group.rank == 1 else []
    found = []
    for given in theirs if group.rank in (1, 3) else []:
        for _ in range(2):
            with EPGroup.from_process_group(given, "cpu", 20.0) as mine:
                found.append((mine.rank, make_transport(mine).all_gather([group.rank], "gather")))
    make_transport(group).all_gather([0], "done")
    for given in theirs * (group.rank in (1, 3)) + alone:
        dist.destroy_process_group(given)
    return found


def test_a_group_is_adopted_whatever_others_there_are_and_again(ranks_of_four: Ranks) -> None:
    found = ranks_of_four.run(adopted_again)
    assert found[0] == found[2] == []
    for rank in (1, 3):
        in_order = [(0 if rank == 1 else 1, [[1], [3]])] * 2
        turned = [(1 - in_order[0][0], [[3], [1]])] * 2
        assert found[rank] in (in_order * 2 + turned, in_order * 2)


class Kept(Exception):
    """The rank whose process may keep the store, as a start would have blamed it."""


def keeps(*_: object) -> None:
    raise Kept(_[-1])


def keeper(group: EPGroup) -> int | None:
    given = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][group.rank % 2]
    real, joining.connect_all = joining.connect_all, keeps  # type: ignore[assignment]
    try:
        EPGroup.from_process_group(given, "cpu", 20.0)
    except Kept as kept:
        return kept.args[0]  # type: ignore[no-any-return]
    finally:
        joining.connect_all = real
        dist.destroy_process_group(given)
    raise AssertionError("ranks met without wires")


def test_whose_process_keeps_the_store(ranks_of_four: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of the world, where it is among them and no launcher does."""
    assert ranks_of_four.run(keeper) == [0, None, 0, None]
    here = Arrival(Card(0, "here", "127.0.0.1", 1, "secret"), 2, ())
    monkeypatch.setattr(joining, "_arrive", lambda *_: (None, [here, here]))
    monkeypatch.setattr(joining, "connect_all", keeps)
    for is_open in (False, True):
        with pytest.raises(Kept) as caught:
            joining.join(1, 2, torch.device("cpu"), 5.0, None, joining.MeetingPoint("127.0.0.1", 1, is_open))
        assert caught.value.args == ((None,) if is_open else (0,))


def come_alone(group: EPGroup) -> str:
    if group.rank == 1:
        time.sleep(2.0)
        return ""
    with pytest.raises(CommTimeout) as caught:
        EPGroup.from_process_group(None, "cpu", 0.5)
    return str(caught.value)


def test_who_does_not_come_to_be_adopted_is_named(ranks_of_two: Ranks) -> None:
    assert ranks_of_two.run(come_alone) == ["rank 0: rank 1 did not arrive within 0.5 s", ""]
    for found in ranks_of_two.run(adopted_by_all):  # and what was left there does not matter
        assert found == [[0], [1]]


def adopted_by_all(group: EPGroup) -> list[list[int]]:
    with EPGroup.from_process_group(None, "cpu", 20.0) as mine:
        return make_transport(mine).all_gather([group.rank], "gather")


def disagreeing(group: EPGroup) -> None:
    EPGroup.from_process_group(None, "cpu", 20.0, Topology((0, group.rank)))


def test_adopting_ranks_must_agree_about_nodes(ranks_of_two: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1 was given nodes \[0, 1\], rank 0 \[0, 0\]") as caught:
        ranks_of_two.run(disagreeing)
    assert caught.value.kinds == {0: "ConfigError", 1: "ConfigError"}


STARTS = """
import os, sys, torch
from crossdock.comm import make_transport
from crossdock.parallel import init
group = init("cpu", 20.0)
print(make_transport(group).all_gather([int(sys.argv[1])], "plan"), flush=True)
os._exit(0)  # without a goodbye
"""


@contextmanager
def kept_store() -> Iterator[int]:
    """The port of a store that outlives ranks, as that of torchrun's agent does."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    yield store.port


def start(port: int, number: int, counts: tuple[int, ...], delays_s: tuple[float, ...]) -> list[str]:
    """What the ranks of a start say, whose agents have counted so many; each begins after its delay."""
    world = {"WORLD_SIZE": str(len(counts)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
             "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    ranks = []
    for rank in sorted(range(len(counts)), key=lambda rank: delays_s[rank]):
        time.sleep(delays_s[rank])
        mine = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(counts[rank])}
        command = [sys.executable, "-c", STARTS, str(number)]
        ranks.append(subprocess.Popen(command, env=os.environ | world | mine, stdout=subprocess.PIPE, text=True,
                                      stderr=subprocess.STDOUT))  # fmt: skip
    return [process.communicate(timeout=60)[0] for process in ranks]


def test_ranks_meet_at_a_store_that_has_seen_others() -> None:
    """A second start after a change of members, whose agents count differently, and one with the first's count."""
    with kept_store() as port:
        for number, counts, delays_s in [(1, (0, 0), (0, 0)), (2, (1, 0), (1, 0)), (3, (0, 0), (0, 0))]:
            assert start(port, number, counts, delays_s) == [f"[[{number}], [{number}]]\n"] * 2


@contextmanager
def meeting_of(*worlds: tuple[int, int], timeouts_s: tuple[float, ...] = ()) -> Iterator[list[object]]:
    """What comes of a meeting of (rank, world size) at one store; a rank's timeout is 5 s unless told."""
    store, found = dist.HashStore(), [None] * len(worlds)

    def come(number: int, rank: int, world_size: int) -> None:
        timeout_s = timeouts_s[number] if timeouts_s else 5.0
        mine = Arrival(Card(rank, "here", "127.0.0.1", number, f"secret {number}"), world_size, ())
        try:
            found[number] = [one.card.port for one in meet(store, mine, time.monotonic() + timeout_s, timeout_s)[1]]
        except CrossdockError as error:
            found[number] = f"{type(error).__name__}: {error}"

    threads = [Thread(target=come, args=(number, *world)) for number, world in enumerate(worlds)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # they come one after another
    for thread in threads:
        thread.join(20.0)
    yield found


def test_ranks_meet_in_any_order() -> None:
    with meeting_of((2, 3), (0, 3), (1, 3)) as found:
        assert found == [[1, 2, 0]] * 3


def test_a_number_given_twice_and_another_world_are_named_to_all() -> None:
    with meeting_of((0, 3), (1, 3), (1, 3)) as found:
        assert found == [f"ConfigError: rank {r}: two processes were started as rank 1" for r in (0, 1, 1)]
    with meeting_of((0, 2), (0, 2), timeouts_s=(5.0, 1.0)) as found:
        assert found[0] == "ConfigError: rank 0: two processes were started as rank 0"
    with meeting_of((1, 3), (0, 2)) as found:
        text = "rank 1 was started with WORLD_SIZE 3, rank 0 with 2"
        assert found == [f"ConfigError: rank {r}: {text}" for r in (1, 0)]


def test_the_first_whose_time_is_over_ends_the_meeting_for_all() -> None:
    began = time.monotonic()
    with meeting_of((0, 4), (1, 4), (3, 4), timeouts_s=(30.0, 3.0, 30.0)) as found:
        assert found == [f"CommTimeout: rank {r}: rank 2 did not arrive within 3 s" for r in (0, 1, 3)]
    assert time.monotonic() - began < 10.0


def test_rank_0_is_named_where_it_does_not_come() -> None:
    with meeting_of((1, 2), timeouts_s=(0.5,)) as found:
        assert found == ["CommTimeout: rank 1: rank 0 did not arrive within 0.5 s"]


def test_leaving_in_good_order_is_no_failure() -> None:
    for error in (None, SystemExit(), SystemExit(0), PlanMismatch("")):
        assert not is_failure(error)
    for error in (SystemExit(1), SystemExit("no"), KeyboardInterrupt(), ValueError(), CommTimeout("")):
        assert is_failure(error)


def leaves(group: EPGroup, code: int | None) -> str:
    """Rank 1 leaves an adopted group by an exit; what rank 0 hears of it."""
    mine = EPGroup.from_process_group(None, "cpu", 20.0)
    if group.rank == 1:
        with pytest.raises(SystemExit), mine:
            raise SystemExit(code)
        return ""
    with mine, pytest.raises(RankFailure) as caught:
        make_transport(mine).all_gather([1], "plan")
    return str(caught.value)


def test_an_exit_in_good_order_is_told_as_one(ranks_of_two: Ranks) -> None:
    assert ranks_of_two.run(leaves, 0) == ["rank 0: plan: rank 1 is gone: left the group", ""]
    assert ranks_of_two.run(leaves, None) == ["rank 0: plan: rank 1 is gone: left the group", ""]
    assert ranks_of_two.run(leaves, 3) == ["rank 0: plan: rank 1 gave up: SystemExit: 3", ""]


UNCLOSED = """
import sys
from crossdock import init, make_transport
group = init("cpu", timeout_s=20.0)
make_transport(group).all_gather([1], "plan")
wires = group.bond.watch.wires
if group.rank == 1:
    sys.exit() if sys.argv[1] == "in good order" else 1 / 0
with wires.changed:
    wires.changed.wait_for(lambda: 1 in wires.lost, 10.0)
print(wires.lost[1].why, wires.lost[1].was_there("torch 1", 1))
"""


@pytest.mark.parametrize(("how", "told"), [("in good order", "left the group True"), ("by an error", "False")])
def test_a_process_that_ends_without_closing_its_group_says_so(
    how: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Others may still be in what it has done, and go on with it."""
    run_ranks([sys.executable, "-c", UNCLOSED, how], 2)
    assert capfd.readouterr().out.strip().endswith(told)


@pytest.mark.parametrize(("code", "told"), [(0, []), (None, []), (3, ["SystemExit: 3"])])
def test_a_command_that_exits_in_good_order_leaves_its_group(
    monkeypatch: pytest.MonkeyPatch, code: int | None, told: list[str]
) -> None:
    aborted: list[str] = []
    closed: list[EPGroup] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(EPGroup, "abort", lambda group, why: aborted.append(why))
    monkeypatch.setattr(EPGroup, "close", lambda group: closed.append(group))
    with pytest.raises(SystemExit), join_ranks("cpu", "auto", 5.0):
        raise SystemExit(code)
    assert aborted == told and bool(closed) == (not told)


def test_the_command_line_and_init_know_the_same_launchers() -> None:
    assert mpi_side.PLACES == group_module.MPIEXEC


def test_an_unknown_host_is_final_and_a_name_server_that_is_away_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [socket.EAI_AGAIN, socket.EAI_AGAIN, socket.EAI_NONAME]

    def refuses(*_: object, **__: object) -> None:
        raise socket.gaierror(answers.pop(0), "said the resolver")

    monkeypatch.setattr(joining.socket, "create_connection", refuses)
    where = joining.MeetingPoint("some.host", 29500)
    with pytest.raises(ConfigError, match=r"rank 1: the host 'some.host' is unknown \(said the resolver\)"):
        joining._until_open(where, 1, time.monotonic() + 20.0)
    assert not answers
    answers.append(socket.EAI_AGAIN)
    with pytest.raises(RuntimeError, match="said the resolver"):
        joining._until_open(where, 1, time.monotonic())


class OneRank:
    """What `join_mpi` asks of MPI before ranks meet."""

    THREAD_SERIALIZED = 2
    COMM_WORLD = SimpleNamespace(Get_size=lambda: 2)

    def Is_finalized(self) -> bool:
        return False

    def Query_thread(self) -> int:
        return 2


def test_under_mpiexec_all_waits_share_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float] = []

    def runs_out(_: object, timeout_s: float) -> None:
        allowed.append(timeout_s)
        raise TimeoutError

    monkeypatch.setattr(mpi_launch, "bounded", runs_out)
    monkeypatch.setattr(mpi_launch, "load_mpi", OneRank)
    monkeypatch.setattr(mpi_launch, "_met", [])
    monkeypatch.setattr(mpi_launch, "_start_mpi", lambda *_: time.sleep(0.5))
    with pytest.raises(CommTimeout, match="rank 0: init: the ranks did not all join within 20 s"):
        mpi_launch.join_mpi(0, 2, 20.0, None)
    assert len(allowed) == 1 and 1.0 <= allowed[0] <= 19.5


def test_under_mpiexec_a_failed_start_leaves_no_port_open(monkeypatch: pytest.MonkeyPatch) -> None:
    listeners: list[Listener] = []

    def listen(rank: int, toward: str) -> Listener:
        listeners.append(Listener(rank, toward))
        return listeners[0]

    def breaks(_: object) -> None:
        raise RuntimeError("MPI_ERR_OTHER")

    here = mpi_launch.Process.here()
    monkeypatch.setattr(mpi_launch, "Listener", listen)
    monkeypatch.setattr(mpi_launch, "load_mpi", OneRank)
    monkeypatch.setattr(mpi_launch, "_met", [])
    monkeypatch.setattr(mpi_launch, "_start_mpi", lambda *_: None)
    monkeypatch.setattr(mpi_launch, "_meet", lambda _: (SimpleNamespace(allgather=breaks), (here, here)))
    with pytest.raises(RankFailure, match="rank 0: init: MPI reports: MPI_ERR_OTHER"):
        mpi_launch.join_mpi(0, 2, 5.0, None)
    assert listeners[0].socket.fileno() == -1


def test_work_that_is_bounded() -> None:
    assert bounded(lambda: 7, 1.0) == 7
    with pytest.raises(KeyError, match="gone"):
        bounded(lambda: {}["gone"], 1.0)
    with pytest.raises(TimeoutError, match=r"not ended after 0.1 s"):
        bounded(lambda: time.sleep(1.0), 0.1)
