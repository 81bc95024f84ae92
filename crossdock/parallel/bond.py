"""`Bond`: what holds the ranks of a group together over torch.distributed, and can be let go of at any moment.

A pending gloo operation cannot be ended from this side: it waits until a connection of its closes or its own timeout
passes, and a process cannot end before (but for rows between nodes, for which threads of their own wait). So when a
group fails, every rank lets go of its process groups at once. A rank with no operation pending closes its connections
by that, which ends the others' operations, and theirs close in turn. Nothing of use is lost: gloo itself closes the
connections of an operation that has failed.
"""

import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from crossdock.parallel.watch import Channel, Watch

NCCL_GRACE_S = 60.0
NOBODY_WAITS = "nobody waits for this start any more"
_one_start = threading.Lock()  # one that was given up may be under way still


class Links:
    """`control` (gloo) carries integers on the host, `rows` the rows of this device; all None once let go of.

    Use them while `in_use` is held, and keep no reference: who drops the last one waits for pending operations.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        self.in_use = threading.Lock()
        self.control: Any = process_group._get_backend(torch.device("cpu"))
        self.rows: Any = process_group._get_backend(torch.device(device.type))
        self.process_group: dist.ProcessGroup | None = process_group

    def drop(self) -> list[Any]:
        """Lets go, and hands over what is left to be released: the last reference waits for pending operations."""
        with self.in_use:
            kept = [self.process_group, self.control, self.rows] if self.process_group is not None else []
            self.process_group = self.control = self.rows = None
            return kept


class Bond:
    """The watch over a group, the store where its parts meet, and its links: the whole group's first, then the parts'.

    `process_group` is the group's own: torch's default group where crossdock started that, or one nobody else uses.
    """

    def __init__(self, watch: Watch, store: Store, process_group: dist.ProcessGroup, device: torch.device) -> None:
        self.watch, self._device = watch, device
        self._store: Store | None = store
        self.whole = Links(process_group, device)
        self._parts: list[Links] = []
        self._names = 0
        self._letting_go = threading.Lock()

    def name(self, kind: str) -> str:
        """A name for a channel, the same on all ranks, which ask for names in the same order."""
        self._names += 1
        return f"{kind} {self._names}"

    def part(self, name: str, rank: int, size: int, timeout_s: float) -> Links:
        """Links among some of the ranks; a collective of those. Raises RuntimeError kin."""
        links = Links(connect(self.store(), name, rank, size, self._device, timeout_s), self._device)
        with self._letting_go:
            if self._store is None:
                release(links.drop())
            else:
                self._parts.append(links)
        return links

    def store(self) -> Store:
        """Where parts meet. Raises RuntimeError once it has been let go of."""
        store = self._store
        if store is None:
            raise RuntimeError("the group of this transport is closed")
        return store

    def let_go(self) -> list[Any]:
        """Drops all links, and hands over what is left of them to be released. An engine's groups stay as they are."""
        with self._letting_go:  # a failure does so from a thread of its own
            kept: list[Any] = [one for links in [self.whole, *self._parts] for one in links.drop()]
            self._parts.clear()
            self._store = None
            if dist.is_initialized() and any(one is dist.group.WORLD for one in kept[:1]):
                if self.watch.failure is not None:
                    kept[0].abort()  # else NCCL would wait for what is pending before it is taken apart
                dist.destroy_process_group()
            return kept


def release(kept: list[Any]) -> None:
    """Drops the references in `kept` from a thread, since the last one waits for pending operations; ends NCCL's."""

    def run() -> None:
        while kept:
            kept.pop().abort()  # NCCL's kernels end; gloo has nothing to end its own with

    threading.Thread(target=run, name="crossdock release").start()


def connect(store: Store, name: str, rank: int, size: int, device: torch.device, timeout_s: float) -> dist.ProcessGroup:
    """A process group of its own, unknown to torch's registry, so that no rank outside it has to take part.

    A collective of its `size` ranks, for which `name` is the same and new at `store`; raises RuntimeError kin.
    """
    wait, inside = timedelta(seconds=timeout_s), PrefixStore(name, store)
    group = dist.ProcessGroup(inside, rank, size)
    gloo = dist.ProcessGroupGloo(PrefixStore("cpu", inside), rank, size, wait)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the current device is a thread's own
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = wait
        nccl = dist.ProcessGroupNCCL(PrefixStore("cuda", inside), rank, size, options)
        group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
        connect_rows(group, device, timeout_s)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._set_group_name(name)  # type: ignore[arg-type]
    return group


def start_world(
    channel: Channel, store: Store, rank: int, size: int, device: torch.device, timeout_s: float
) -> dist.ProcessGroup:
    """torch's default process group of `size` ranks, a collective of them; `channel` waits for it.

    Where that fails no default group is left, now or when a thread that is left behind has made it after all; before
    that, or torch's timeout, no other start of this process begins, and the caller should make no default group.
    """
    wait, settling = timedelta(seconds=timeout_s), threading.Lock()
    begun, given_up = threading.Event(), threading.Event()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"

    def begin() -> dist.ProcessGroup:
        with _one_start:
            if given_up.is_set():
                raise RuntimeError(NOBODY_WAITS)
            if not dist.is_initialized():  # torch counts its starts, and ranks that have failed more often do not meet
                dist.distributed_c10d._world.group_count = 0
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
            with settling:
                begun.set()
                if given_up.is_set():
                    dist.destroy_process_group()
                    raise RuntimeError(NOBODY_WAITS)
                assert dist.group.WORLD is not None
                return dist.group.WORLD

    def work() -> dist.ProcessGroup:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is a thread's own
        group = begin()
        connect_rows(group, device, timeout_s)
        return group

    try:
        return channel.run(channel.name, work)
    except BaseException:
        with settling:
            given_up.set()
            if begun.is_set():
                dist.destroy_process_group()
        raise


def connect_rows(group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> None:
    """Makes NCCL's connections now, while the wait for it is bounded: else the first exchange would, on the stream.

    Where NCCL refuses, that exchange says why: ranks may share a GPU, which other transports do not mind. Where an
    operation takes too long NCCL ends this process, which may only wait for another rank: so its limit comes
    NCCL_GRACE_S after that of our waits, which name who is to blame.
    """
    if device.type != "cuda":
        return
    nccl: Any = group._get_backend(device)
    nccl._set_default_timeout(timedelta(seconds=timeout_s + NCCL_GRACE_S))
    eager = getattr(nccl, "eager_connect_single_device", None)
    if eager is not None:
        with suppress(RuntimeError):
            eager(device)
