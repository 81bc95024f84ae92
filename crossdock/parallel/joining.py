"""How ranks become a group over torch.distributed: those of a launcher, and those of an engine that has begun already.

    cards exchanged -> wires between all ranks -> a process group

In that order, so that a rank lost while the process group is made is named, too.
"""

import itertools
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group: its defaults would keep it (optimizers import this late)
from torch.distributed.distributed_c10d import PrefixStore

from crossdock.errors import CommTimeout, ConfigError, CrossdockError
from crossdock.parallel.bond import Bond
from crossdock.parallel.bounded import bounded
from crossdock.parallel.meeting import Arrival, disagreement, meet, topology_of
from crossdock.parallel.topology import Topology
from crossdock.parallel.watch import Watch
from crossdock.parallel.wires import Listener, Wires

GRACE_S = 2.0  # how long after the timeout torch may still raise an error of its own, which says more
TRY_S = 10.0  # to connect to a host that does not answer, before the next try
LEAST_S = 1.0  # what is left of the timeout for the next step, at least
_joins = itertools.count()  # a store may outlive a group, and ranks join once more than they have before


@dataclass(frozen=True)
class MeetingPoint:
    """Where ranks meet: rank 0 opens a store there, or a launcher has done so (`start`, a name of this start)."""

    host: str
    port: int
    start: str | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def join(
    rank: int, world_size: int, device: torch.device, timeout_s: float, topology: Topology | None, where: MeetingPoint
) -> tuple[Bond, Topology]:
    """Meets the other ranks; torch's default process group becomes theirs. Raises what `init` does."""
    listener = Listener(rank, where.host)
    deadline = time.monotonic() + timeout_s
    mine = Arrival(listener.card, world_size, topology.node_of_rank if topology else ())
    try:
        store, met = _arrive(where, mine, deadline, timeout_s)
    except BaseException:
        listener.socket.close()
        raise
    watch = _wire(listener, met, where.host, deadline)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"

    def start() -> dist.ProcessGroup:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is a thread's own
        wait = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    left = max(LEAST_S, deadline - time.monotonic())
    try:
        process_group = watch.channel("init", watch.members, left).run("init", start)
    except BaseException:
        watch.close()
        raise
    return Bond(watch, store, process_group, device, is_default=True), topology_of(met)


def _arrive(where: MeetingPoint, mine: Arrival, deadline: float, timeout_s: float) -> tuple[PrefixStore, list[Arrival]]:
    """The store, and every rank's arrival there."""
    rank = mine.card.rank
    opens = rank == 0 and where.start is None
    prefix = f"crossdock/{where.start}/{next(_joins)}"

    def work() -> tuple[PrefixStore, list[Arrival]]:
        if not opens:
            _until_open(where, rank, deadline)
        wait = timedelta(seconds=timeout_s)
        store = dist.TCPStore(where.host, where.port, None, opens, wait, wait_for_workers=False)  # type: ignore[attr-defined]
        inside = PrefixStore(prefix, store)
        return inside, meet(inside, mine, deadline, timeout_s)

    try:
        return bounded(work, timeout_s + GRACE_S)
    except CrossdockError as error:
        raise type(error)(f"{error} at {where}") from error
    except (RuntimeError, TimeoutError) as error:
        what = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        if opens and not isinstance(error, TimeoutError):
            raise ConfigError(f"rank {rank}: cannot meet the other ranks at {where}: {what}") from error
        raise CommTimeout(f"rank {rank}: no answer from rank 0 at {where} within {timeout_s:g} s: {what}") from error


def adopt(
    given: dist.ProcessGroup, device: torch.device, timeout_s: float, topology: Topology | None, owned: bool
) -> tuple[Bond, Topology]:
    """Watches over the ranks of a process group: over `given` where it is ours (`owned`), else a new one of its ranks.

    Raises CommTimeout and ConfigError where they do not all come, or differ in `topology`.
    """
    wait, deadline = timedelta(seconds=timeout_s), time.monotonic() + timeout_s
    rank, world_size = dist.get_rank(given), dist.get_world_size(given)
    host = _store_host()
    listener = Listener(rank, host)
    mine = Arrival(listener.card, world_size, topology.node_of_rank if topology else ())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"

    def start() -> tuple[dist.ProcessGroup, list[Arrival]]:
        group = given
        if not owned:
            ranks = dist.get_process_group_ranks(given)
            group = dist.new_group(ranks, wait, backend, use_local_synchronization=True)
        told: list[str] = [""] * world_size
        dist.all_gather_object(told, mine.told(), group=group)
        return group, [Arrival.heard(one) for one in told]

    try:
        process_group, met = bounded(start, timeout_s + GRACE_S)
    except (RuntimeError, TimeoutError) as error:
        listener.socket.close()
        what = f"the {world_size} ranks did not all join within {timeout_s:g} s: {str(error).splitlines()[0]}"
        raise CommTimeout(f"rank {rank}: {what}") from error
    problem = next(filter(None, (disagreement(mine, other) for other in met)), "")
    if problem:
        listener.socket.close()
        raise ConfigError(f"rank {rank}: {problem}")
    watch = _wire(listener, met, host, deadline)
    store = PrefixStore(f"crossdock/{process_group.group_name}", dist.distributed_c10d._get_default_store())
    return Bond(watch, store, process_group, device, is_default=owned), topology_of(met)


def _wire(listener: Listener, met: list[Arrival], host: str, deadline: float) -> Watch:
    cards = [arrival.card for arrival in met]
    wires = Wires(listener, cards, host, max(deadline, time.monotonic() + LEAST_S))
    return Watch(wires, tuple(range(len(cards))))


def _until_open(where: MeetingPoint, rank: int, deadline: float) -> None:
    """Until something listens there. torch would retry beyond its timeout, and write about it at length."""
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            with socket.create_connection((where.host, where.port), timeout=min(left, TRY_S)):
                return
        except socket.gaierror as error:
            raise ConfigError(f"rank {rank}: the host {where.host!r} is unknown ({error.strerror})") from error
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(str(error)) from error
            time.sleep(0.05)


def _store_host() -> str:
    """A host all ranks reach: that of the store they met at."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return getattr(store, "host", socket.gethostname())
