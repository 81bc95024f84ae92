"""How ranks become a group over torch.distributed: those of a launcher, and those of an engine that has begun already.

    cards exchanged -> wires between all ranks -> a process group

In that order, so that a rank lost while the process group is made is named, too.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group: its defaults would keep it (optimizers import this late)
from torch.distributed.distributed_c10d import PrefixStore

from crossdock.errors import CommTimeout, ConfigError, CrossdockError
from crossdock.parallel.bond import Bond, connect, start_world
from crossdock.parallel.bounded import bounded
from crossdock.parallel.dialling import connect_all
from crossdock.parallel.meeting import Arrival, Listener, meet, topology_of
from crossdock.parallel.topology import Topology
from crossdock.parallel.watch import Channel, Watch

GRACE_S = 2.0  # how long after the timeout torch may still raise an error of its own, which says more
TRY_S = 10.0  # to connect to a host that does not answer, before the next try
LEAST_S = 1.0  # what is left of the timeout for the next step, at least
PHASE = "init"
Met = tuple[PrefixStore, list[Arrival]]


@dataclass(frozen=True)
class MeetingPoint:
    """Where ranks meet: rank 0 opens a store there, unless a launcher has done so (`is_open`)."""

    host: str
    port: int
    is_open: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def join(
    rank: int, world_size: int, device: torch.device, timeout_s: float, topology: Topology | None, where: MeetingPoint
) -> tuple[Bond, Topology]:
    """Meets the other ranks; torch's default process group becomes theirs. Raises what `init` does."""
    deadline = time.monotonic() + timeout_s

    def start(store: PrefixStore, channel: Channel) -> dist.ProcessGroup:
        return start_world(channel, store, rank, world_size, device, timeout_s)

    def arrive(mine: Arrival) -> Met:
        return _arrive(where, mine, deadline, timeout_s)

    keeper = None if where.is_open else 0
    return _become(rank, world_size, device, where.host, keeper, topology, deadline, arrive, start)


def adopt(
    given: dist.ProcessGroup, device: torch.device, timeout_s: float, topology: Topology | None
) -> tuple[Bond, Topology]:
    """A process group of the ranks of `given`, which stays the engine's, and the watch over it.

    They meet at the store of the engine's default group, in a place of its own for these ranks in this order, whatever
    other groups each of them is in. Raises CommTimeout and ConfigError where they do not all come, or differ in
    `topology`, RankFailure where one is lost meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    rank, world_size = dist.get_rank(given), dist.get_world_size(given)
    name = f"crossdock/adopted/{tuple(dist.get_global_rank(given, r) for r in range(world_size))}"
    place = PrefixStore(name, dist.distributed_c10d._get_default_store())

    def arrive(mine: Arrival) -> Met:
        try:
            return bounded(lambda: meet(place, mine, deadline, timeout_s), timeout_s + GRACE_S)
        except CrossdockError:
            raise
        except (RuntimeError, TimeoutError) as error:
            what = f"the {world_size} ranks did not all join within {timeout_s:g} s: {_first_line(error)}"
            raise CommTimeout(f"rank {rank}: {what}") from error

    def start(store: PrefixStore, channel: Channel) -> dist.ProcessGroup:
        return channel.run(PHASE, lambda: connect(store, name, rank, world_size, device, timeout_s))

    keeper = dist.get_group_rank(given, 0) if 0 in dist.get_process_group_ranks(given) else None
    return _become(rank, world_size, device, _store_host(), keeper, topology, deadline, arrive, start)


def _become(
    rank: int,
    world_size: int,
    device: torch.device,
    host: str,
    keeper: int | None,
    topology: Topology | None,
    deadline: float,
    arrive: Callable[[Arrival], Met],
    start: Callable[[PrefixStore, Channel], dist.ProcessGroup],
) -> tuple[Bond, Topology]:
    """A group of the ranks that `arrive` meets, whose process group `start` makes; nothing is left open by an error.

    `host` is where the store is, `keeper` the rank among these, if any, whose process it may be in.
    """
    listener = Listener(rank, host)
    try:
        store, met = arrive(Arrival(listener.card, world_size, topology.node_of_rank if topology else ()))
        cards = [arrival.card for arrival in met]
        wires = connect_all(listener, cards, host, max(deadline, time.monotonic() + LEAST_S), keeper)
    except BaseException:
        listener.socket.close()
        raise
    watch = Watch(wires, tuple(range(world_size)))
    left = max(LEAST_S, deadline - time.monotonic())
    try:
        process_group = start(store, watch.channel(PHASE, watch.members, left))
    except BaseException as error:  # of the group's failure, or as an interrupt that the others would wait for
        watch.abort(f"{type(error).__name__}: {error}")
        watch.close()
        raise
    return Bond(watch, store, process_group, device), topology_of(met)


def _arrive(where: MeetingPoint, mine: Arrival, deadline: float, timeout_s: float) -> Met:
    """The store, and every rank's arrival there."""
    rank = mine.card.rank
    opens = rank == 0 and not where.is_open

    def work() -> Met:
        if not opens:
            _until_open(where, rank, deadline)
        wait = timedelta(seconds=timeout_s)
        store = dist.TCPStore(where.host, where.port, None, opens, wait, wait_for_workers=False)  # type: ignore[attr-defined]
        return meet(PrefixStore("crossdock", store), mine, deadline, timeout_s)

    try:
        return bounded(work, timeout_s + GRACE_S)
    except CrossdockError as error:
        raise type(error)(f"{error} at {where}") from error
    except (RuntimeError, TimeoutError) as error:
        what = "the port is in use" if "EADDRINUSE" in str(error) else _first_line(error)
        if opens and not isinstance(error, TimeoutError):
            raise ConfigError(f"rank {rank}: cannot meet the other ranks at {where}: {what}") from error
        raise CommTimeout(f"rank {rank}: no answer from rank 0 at {where} within {timeout_s:g} s: {what}") from error


def _until_open(where: MeetingPoint, rank: int, deadline: float) -> None:
    """Until something listens there. torch would retry beyond its timeout, and write about it at length."""
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            with socket.create_connection((where.host, where.port), timeout=min(left, TRY_S)):
                return
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:  # others may pass
                raise ConfigError(f"rank {rank}: the host {where.host!r} is unknown ({error.strerror})") from error
            if time.monotonic() >= deadline:
                raise RuntimeError(str(error)) from error
            time.sleep(0.05)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _store_host() -> str:
    """A host all ranks reach: that of the store they met at."""
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return getattr(store, "host", socket.gethostname())
