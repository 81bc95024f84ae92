"""The `mpi` transport under a real mpiexec: the oracle's bits; errors that name ranks; no rank waits for ever."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock import EPGroup, make_transport
from crossdock.comm.mpi import _Moving, _one_call
from crossdock.errors import ConfigError
from tests.comm.cases import cases, oracle, oracle_over_nodes
from tests.comm.test_conformance import NODES, compare
from tests.mpi import ROOT, Finished, mpiexec, needs_mpi, told

pytestmark = [needs_mpi, pytest.mark.timeout(150)]
SURVIVORS = ["-disable-auto-cleanup"]  # else hydra kills every rank as soon as one has ended with MPI under way


def run(world_size: int, parts: list[str], folder: Path, options: list[str] | None = None) -> tuple[Finished, Any]:
    """How it ended, and what each rank saw in each part."""
    done = mpiexec(world_size, ["-m", "tests.comm.mpi_rank", str(folder), *parts], options or [])
    return done, told(folder, world_size)


def check(found: list[Any], world_size: int) -> None:
    """Holds what each of the ranks found of every case to the oracle."""
    for case, results in zip(cases(world_size), zip(*found, strict=True), strict=True):
        compare(case, list(results), oracle(case), exact_dx=True)


def test_two_ranks_carry_every_case_and_torch(tmp_path: Path) -> None:
    done, seen = run(2, ["conformance", "over_torch"], tmp_path)
    assert (done.code, done.out, done.err) == (0, "", "")
    check([found["conformance"] for found in seen], 2)
    for found in seen:
        assert found["over_torch"]["name"] == "torch"
        assert torch.equal(found["over_torch"]["rows"], found["over_torch"]["again"])


def test_three_ranks_carry_every_case_and_two_exchanges_at_once(tmp_path: Path) -> None:
    done, seen = run(3, ["conformance", "in_flight"], tmp_path)
    assert (done.code, done.out, done.err) == (0, "", "")
    check([found["conformance"] for found in seen], 3)
    for found in seen:
        two = found["in_flight"]
        assert two["first"].tolist() == [1.0, 2.0, 3.0]
        assert two["dtype"] == "torch.float8_e4m3fn" and torch.equal(two["second"], torch.ones(3, 5))


def test_four_ranks_carry_every_case_flat_and_over_nodes_and_in_parts(tmp_path: Path) -> None:
    done, seen = run(4, ["conformance", "over_nodes", "parts"], tmp_path)
    assert (done.code, done.out, done.err) == (0, "", "")
    check([found["conformance"] for found in seen], 4)
    for shape in ("2x2", "2x2 interleaved"):
        by_case = zip(*(found["over_nodes"][shape] for found in seen), strict=True)
        for case, results in zip(cases(4), by_case, strict=True):
            compare(case, list(results), oracle_over_nodes(case, NODES[shape]), exact_dx=False)
    for half in (seen[::2], seen[1::2]):
        check([found["parts"]["cases"] for found in half], 2)
    for rank, found in enumerate(seen):
        part = found["parts"]
        assert part["members"] == ((0, 2) if rank % 2 == 0 else (1, 3)) and part["nodes"] == (0, 0)
        assert part["gathered"] == ([[rank]] if rank in (0, 3) else [[1], [2]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_of_a_gpu_pass_through_the_host(tmp_path: Path) -> None:
    done, seen = run(3, ["on_gpu"], tmp_path)
    assert done.code == 0, done.err
    for found in (one["on_gpu"] for one in seen):
        expected = torch.repeat_interleave(torch.arange(3) + 0.5, torch.tensor(found["counts"])).bfloat16()
        assert found["device"] == "cuda" and torch.equal(found["rows"], expected[:, None].expand(-1, 5))


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What three ranks saw of every failure after which all of them still run."""
    names = ["disagree", "other_phase", "other_counts", "other_width", "other_length", "other_transport", "other_parts",
             "other_nodes", "leaves", "aborts", "aborts_torch", "over_torch", "late"]  # fmt: skip
    done, seen = run(3, names, tmp_path_factory.mktemp("failures"), SURVIVORS)
    assert (done.code, done.err) == (0, "")
    return seen


def named(found: dict[str, Any], kind: str, text: str) -> bool:
    """Whether this is that error, raised soon enough; `text` is a pattern, and who found it may stand behind."""
    return found["kind"] == kind and re.match(text, found["message"]) is not None and found["seconds"] < 30


def test_ranks_with_other_rows_are_named_before_any_moves(failures: Any) -> None:
    plan = "plan of exchange 1 in MoE layer 0: hidden size is"
    assert named(failures[0]["disagree"], "PlanMismatch", f"rank 0: {plan} 9 on rank 1, expected 8 as here")
    assert named(failures[1]["disagree"], "PlanMismatch", f"rank 1: {plan} 9 on rank 1, expected 8 as on rank 0")
    assert named(failures[2]["disagree"], "PlanMismatch", f"rank 2: {plan} 9 on rank 1, expected 8 as here")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("other_phase", "rank 1 is elsewhere: plan"),
        ("other_counts", "rank 0 sends 2 of 12 bytes, expected 1 of 12"),
        ("other_width", "rank 1 sends 1 of 8 bytes, expected 1 of 12"),
        ("other_length", "rank 1 sends 4 of 8 bytes, expected 3 of 8"),
        ("other_transport", "rank 1 is elsewhere: dispatch by another transport"),
        ("other_parts", r"rank 1 has other parts than rank 0, found \[\[0.* here"),
    ],
)
def test_ranks_in_different_collectives_are_named_by_every_rank(part: str, text: str, failures: Any) -> None:
    """MPI itself would hand over what bytes there are."""
    for rank, seen in enumerate(failures):
        assert named(seen[part], "PlanMismatch", f"rank {rank}: .*{text}"), seen[part]


def test_ranks_given_other_nodes_are_named(failures: Any) -> None:
    for rank, nodes in enumerate(("[0, 0, 1], rank 0 [0, 1, 1]", "[0, 1, 1], rank 1 [0, 0, 1]")):
        found = failures[rank]["other_nodes"]
        assert named(found, "ConfigError", re.escape(f"rank {rank}: rank {1 - rank} was given nodes {nodes}")), found


def test_a_rank_that_leaves_is_named_at_once(failures: Any) -> None:
    for rank in (0, 2):
        found = failures[rank]["leaves"]
        assert named(found, "RankFailure", f"rank {rank}: dispatch: rank 1 is gone: .*left the group"), found
    assert failures[1]["leaves"]["message"] == "rank 1: the group of this transport is closed"


@pytest.mark.parametrize("part", ["aborts", "aborts_torch"])
def test_a_rank_can_end_the_waits_of_all(part: str, failures: Any) -> None:
    for rank, seen in enumerate(failures):
        found = seen[part]
        where = "start of torch" if part == "aborts_torch" and rank == 2 else "dispatch"
        assert named(found, "RankFailure", f"rank {rank}: {where}: rank 1 gave up: its disk is full"), found


def test_torch_starts_again_after_a_start_that_failed_on_one_rank(failures: Any) -> None:
    for seen in failures:
        assert torch.equal(seen["over_torch"]["rows"], torch.ones(3, 3))


def test_a_rank_that_does_not_come_is_named(failures: Any) -> None:
    """Rank 2 comes a second later than rank 0, and is not."""
    for rank in (0, 2):
        found = failures[rank]["late"]
        assert named(found, "CommTimeout", f"rank {rank}: dispatch: rank 1 did not arrive within 3 s"), found


def test_a_rank_that_dies_is_named_by_every_other_and_they_go_on(tmp_path: Path) -> None:
    done, seen = run(4, ["dies"], tmp_path, SURVIVORS)
    assert done.code != 0 and seen[1] is None
    for rank in (0, 2, 3):
        found = seen[rank]["dies"]
        assert named(found, "RankFailure", f"rank {rank}: dispatch: rank 1 is gone: .*process.*ended"), found
        assert found["left"] == (0, 2, 3) and torch.equal(found["rows"], torch.ones(3, 3))


def test_mpiexec_ends_a_job_of_which_a_rank_is_killed(tmp_path: Path) -> None:
    """What hydra does by itself: no rank is left, nor waits."""
    done, _ = run(3, ["is_killed"], tmp_path)
    assert done.code != 0 and done.seconds < 30


def test_a_rank_that_is_stopped_is_named_by_every_other(tmp_path: Path) -> None:
    """It goes on six seconds after the timeout, and learns that it is too late."""
    done, seen = run(3, ["is_stopped"], tmp_path, SURVIVORS)
    assert None not in seen, done
    for rank in (0, 2):
        found = seen[rank]["is_stopped"]
        assert named(found, "RankFailure", f"rank {rank}: dispatch: no sign of rank 1"), found
    assert "the others gave up on this rank" in seen[1]["is_stopped"]["message"]


def test_a_rank_that_never_starts_is_waited_for_so_long(tmp_path: Path) -> None:
    done, seen = run(3, ["never_starts"], tmp_path, SURVIVORS)
    for rank in (0, 2):
        found = seen[rank]["never_starts"]
        assert named(found, "CommTimeout", f"rank {rank}: init: the 3 ranks did not all start MPI within 3 s"), found
    assert done.seconds < 40


def test_an_error_that_nobody_catches_ends_the_job(tmp_path: Path) -> None:
    done, _ = run(3, ["raises"], tmp_path)
    assert done.code != 0 and "ZeroDivisionError: broken on purpose" in done.err and done.seconds < 40


def test_a_wait_ends_while_another_thread_never_returns_from_mpi() -> None:
    """As where ranks are divided and one does not come: the look at the group's failure must have its turn."""

    class Request:
        def Test(self) -> bool:
            return True

    moving = _Moving(0)
    moving.requests.append(Request())
    waited: list[bool] = []
    wait = threading.Thread(target=lambda: waited.append(moving.poll(0.1)), daemon=True)
    with _one_call:
        wait.start()
        wait.join(20.0)
        assert waited == [False]
    assert moving.poll(0.1)


def python(code: str, **environment: str) -> str:
    """stderr of a process that believes mpiexec started it."""
    kept = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip
    assert done.returncode == 1
    return done.stderr


def test_another_mpi_than_that_of_mpi4py_is_refused() -> None:
    """As under Open MPI's mpiexec, with mpi4py on MPICH: every process believes to be alone."""
    said = python("import crossdock; crossdock.init('cpu')", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2")
    assert re.search("ConfigError: rank 1: mpiexec started 2 ranks, and mpi4py's MPI.* sees 1: mpiexec and", said), said


def test_without_mpi4py_it_says_what_to_install() -> None:
    block = "import sys; sys.modules['mpi4py'] = None; import crossdock; crossdock.init('cpu')"
    said = python(block, PMI_RANK="0", PMI_SIZE="2")
    assert "crossdock.errors.ConfigError: transport 'mpi' needs mpi4py: pip install 'crossdock[mpi]'\n" in said


def test_a_group_that_mpiexec_did_not_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs ranks that mpiexec started"):
        make_transport(EPGroup.solo(), "mpi")
    with pytest.raises(ConfigError, match="needs ranks that mpiexec started"):
        make_transport(EPGroup(0, 2, torch.device("cpu"), None, EPGroup.solo().topology, 1.0), "mpi")
