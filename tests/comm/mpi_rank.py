"""A rank of `test_mpi.py`, started by mpiexec: plays parts one after the other and saves what it saw as FOLDER/RANK.pt.

Each part is a group of its own in the same process.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crossdock import EPGroup, init, make_transport
from crossdock.comm import Dispatcher, Transport
from crossdock.errors import CrossdockError, RankFailure
from crossdock.parallel import Topology, mpi_launch, recover
from tests.comm.cases import cases, exchange
from tests.comm.test_conformance import NODES, run_cases

RANK = int(os.environ["PMI_RANK"])
SHORT_S = 3.0  # a timeout to wait for


def ones(transport: Transport, phase: str) -> torch.Tensor:
    """One row to each rank and from each."""
    each = [1] * transport.world_size
    return transport.all_to_all_rows(torch.ones(transport.world_size, 3), each, each, phase).wait()


def conformance(group: EPGroup) -> Any:
    assert make_transport(group).name == "mpi"
    return run_cases(group, "mpi", (0,) * group.world_size, cases(group.world_size), "flat")


def over_nodes(group: EPGroup) -> Any:
    """The same where a token crosses to a node once."""
    return {shape: run_cases(group, "mpi", NODES[shape], cases(4), "node") for shape in ("2x2", "2x2 interleaved")}


def parts(group: EPGroup) -> Any:
    """The even and the odd ranks run the cases of half the world, each for themselves."""
    part = make_transport(group).split([[0, 2], [1, 3]])
    small = make_transport(group).split([[0], [1, 2], [3]])
    return {
        "members": part.members,
        "nodes": part.topology.node_of_rank,
        "gathered": small.all_gather([group.rank], "count"),
        "cases": [exchange(part, case) for case in cases(2)],
    }


def in_flight(group: EPGroup) -> Any:
    """Two exchanges under way at once, waited for in the other order; one of 3 MB, one of a dtype gloo refuses."""
    carrier = make_transport(group)
    each = [4096] * group.world_size
    rows = torch.full((4096 * group.world_size, 64), float(group.rank + 1))
    first = carrier.all_to_all_rows(rows, each, each, "first")
    codes = torch.ones(group.world_size, 5).to(torch.float8_e4m3fn)
    one = [1] * group.world_size
    second = carrier.all_to_all_rows(codes, one, one, "second").wait()
    return {"first": first.wait()[::4096, 0], "second": second.float(), "dtype": str(second.dtype)}


def on_gpu(group: EPGroup) -> Any:
    """Rows of a GPU that all ranks share, in pieces whose sizes differ by sender and receiver."""
    carrier, ranks = make_transport(group), range(group.world_size)
    sends = [[2 * source + target for target in ranks] for source in ranks]
    receives = [sends[source][group.rank] for source in ranks]
    rows = torch.full((sum(sends[group.rank]), 5), group.rank + 0.5, device=group.device, dtype=torch.bfloat16)
    arrived = carrier.all_to_all_rows(rows, sends[group.rank], receives, "rows").wait()
    return {"device": arrived.device.type, "counts": receives, "rows": arrived.cpu()}


def other_nodes(group: EPGroup) -> Any:
    with init("cpu", 60.0, Topology((0, 0, 1) if group.rank == 1 else (0, 1, 1))):
        pass


def over_torch(group: EPGroup) -> Any:
    carrier = make_transport(group, "torch")
    return {"name": carrier.name, "rows": ones(carrier, "rows"), "again": ones(make_transport(group), "rows")}


def disagree(group: EPGroup) -> Any:
    Dispatcher(make_transport(group), 12, 9 if group.rank == 1 else 8, torch.float32).plan(torch.zeros(3, 2).long())


def other_phase(group: EPGroup) -> Any:
    carrier = make_transport(group)
    if group.rank == 1:
        carrier.all_gather([1, 2], "plan")
    ones(carrier, "dispatch")


def other_counts(group: EPGroup) -> Any:
    carrier = make_transport(group)
    counts = [2, 1, 1] if group.rank == 0 else [1, 1, 1]
    carrier.all_to_all_rows(torch.ones(sum(counts), 3), counts, [1, 1, 1], "dispatch").wait()
    ones(carrier, "combine")


def other_width(group: EPGroup) -> Any:
    """Rank 1 finds out first."""
    carrier, each = make_transport(group), [1] * group.world_size
    time.sleep(0.3 * (group.rank != 1))
    carrier.all_to_all_rows(torch.ones(group.world_size, 2 if group.rank == 1 else 3), each, each, "dispatch").wait()


def other_length(group: EPGroup) -> Any:
    carrier = make_transport(group)
    time.sleep(0.3 * (group.rank != 1))
    carrier.all_gather([0] * (4 if group.rank == 1 else 3), "count")


def other_transport(group: EPGroup) -> Any:
    """Two over one communicator; rank 1 takes the other one first."""
    carriers = [make_transport(group), make_transport(group)]
    ones(carriers[int(group.rank == 1)], "dispatch")


def aborts_torch(group: EPGroup) -> Any:
    """What ends one of a group's transports ends a wait on another, and the start of the first where a rank is slow."""
    assert group.watch is not None
    watch, connect = group.watch, mpi_launch.connect

    def connect_slowly(*given: Any) -> Any:
        made = connect(*given)
        with watch.wires.changed:
            watch.wires.changed.wait_for(lambda: watch.failure is not None, 20.0)
        time.sleep(1.0)  # the wait for this thread looks soon
        return made

    mpi_launch.connect = connect_slowly if group.rank == 2 else connect
    try:
        over_torch, carrier = make_transport(group, "torch"), make_transport(group)
    finally:
        mpi_launch.connect = connect
    if group.rank == 0:
        watch.tell("through")
    if group.rank == 1:
        with watch.wires.changed:
            assert watch.wires.changed.wait_for(lambda: "through" in watch.notes, 20.0)
        over_torch.abort("its disk is full")
    ones(carrier, "dispatch")


def other_parts(group: EPGroup) -> Any:
    make_transport(group).split([[0], [1, 2]] if group.rank == 1 else [[0, 1], [2]])


def leaves(group: EPGroup) -> Any:
    carrier = make_transport(group)
    ones(carrier, "warm up")
    if group.rank == 1:
        group.close()
        return carrier.all_gather([1], "count")
    ones(carrier, "dispatch")


def aborts(group: EPGroup) -> Any:
    carrier = make_transport(group)
    ones(carrier, "warm up")
    if group.rank == 1:
        carrier.abort("its disk is full")
    ones(carrier, "dispatch")


def late(group: EPGroup) -> Any:
    ones(make_transport(group), "warm up")
    carrier = make_transport(replace(group, timeout_s=SHORT_S))
    if group.rank == 1:
        time.sleep(3 * SHORT_S)
        return None
    if group.rank == 2:
        time.sleep(1.0)  # as others compute: it comes, if later
    ones(carrier, "dispatch")


def dies(group: EPGroup) -> Any:
    carrier = make_transport(group)
    ones(carrier, "warm up")
    if group.rank == 1:
        os._exit(3)
    began = time.monotonic()
    try:
        ones(carrier, "dispatch")
    except RankFailure as error:
        seconds = time.monotonic() - began
        with recover(group) as left:
            rows = ones(make_transport(left), "dispatch")
            return {
                "kind": "RankFailure",
                "message": str(error),
                "seconds": seconds,
                "left": left.members,
                "rows": rows,
            }


def is_killed(group: EPGroup) -> Any:
    carrier = make_transport(group)
    ones(carrier, "warm up")
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ones(carrier, "dispatch")


def is_stopped(group: EPGroup) -> Any:
    ones(make_transport(group), "warm up")
    carrier = make_transport(replace(group, timeout_s=SHORT_S))
    if group.rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep 9; kill -CONT {os.getpid()}"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    ones(carrier, "dispatch")
    ones(carrier, "combine")  # the stopped rank may have found all rows for its dispatch


def raises(group: EPGroup) -> Any:
    if group.rank == 1:
        raise ZeroDivisionError("broken on purpose")
    ones(make_transport(group), "dispatch")


PARTS: dict[str, Callable[[EPGroup], Any]] = {
    part.__name__: part
    for part in (conformance, over_nodes, parts, in_flight, on_gpu, other_nodes, over_torch, disagree, other_phase,
                 other_counts, other_width, other_length, other_transport, other_parts, aborts_torch,
                 leaves, aborts, late, dies, is_killed, is_stopped, raises)
}  # fmt: skip


def play(name: str) -> Any:
    if name == "never_starts" and RANK == 1:
        return None
    timeout_s = SHORT_S if name == "never_starts" else 60.0
    with init("cuda:0" if name == "on_gpu" else "cpu", timeout_s) as group:
        return PARTS[name](group)


def main(names: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # by which hydra tells ranks, also before `init`, that one has ended
    seen = {}
    for name in names:
        began = time.monotonic()
        try:
            seen[name] = play(name)
        except CrossdockError as error:
            seen[name] = {"kind": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    torch.save(seen, folder / f"{RANK}.pt")
    deadline = time.monotonic() + 30.0
    while "never_starts" in names and len(list(folder.glob("*.pt"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)  # MPI does not start any more once a rank has ended


if __name__ == "__main__":
    main(sys.argv[2:], Path(sys.argv[1]))
