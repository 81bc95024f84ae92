"""`EPGroup`: the ranks that share one set of experts, and `init`, which builds it from what a launcher set.

Only `init` reads the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them, and
where those are absent the rank and size that mpiexec sets. An engine that has torch.distributed running already gives
its process group to `EPGroup.from_process_group` instead. Which ranks share a node is told by their hosts' names, or by
the caller:

    group = crossdock.init(topology=Topology((0, 0, 1, 1)))
"""

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from crossdock.errors import ConfigError, PlanMismatch
from crossdock.parallel.bond import Bond, release
from crossdock.parallel.joining import MeetingPoint, adopt, join
from crossdock.parallel.mpi_launch import join_mpi
from crossdock.parallel.topology import Topology
from crossdock.parallel.watch import Watch

LONGEST_S = 1e9  # 31 years: torch counts its timeouts in 64-bit nanoseconds
# Of MPICH, of Open MPI. The command line, which reads them before torch is imported, has its own.
MPIEXEC = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))


@dataclass(frozen=True)
class EPGroup:
    """This rank, its device, and the process group it shares with the others.

    That is None in a group of one, once the group is closed or has failed, and under mpiexec until a transport of
    torch is asked for. `communicator` is what ranks that mpiexec started have instead of a process group: see
    `parallel.mpi_launch`. `timeout_s` bounds every wait on another rank, in seconds. `members` are the ranks' numbers
    in the world as it was started, by which errors call them: 0..W-1 until some are lost (`recover`). `bond` is there
    with a process group. Use as a context manager, which tells the others of an exception that leaves it, or call
    `close`.
    """

    rank: int
    world_size: int
    device: torch.device
    process_group: dist.ProcessGroup | None
    topology: Topology
    timeout_s: float
    communicator: Any | None = None
    members: tuple[int, ...] = ()
    bond: Bond | None = None

    def __post_init__(self) -> None:
        if not self.members:
            object.__setattr__(self, "members", tuple(range(self.world_size)))

    @classmethod
    def solo(cls, device: torch.device | str = "cpu", timeout_s: float = 300.0) -> "EPGroup":
        """A group of one, which needs no launcher and starts nothing."""
        return cls(0, 1, torch.device(device), None, Topology((0,)), timeout_s)

    @classmethod
    def from_process_group(
        cls,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        timeout_s: float = 300.0,
        topology: Topology | None = None,
    ) -> "EPGroup":
        """The ranks of a process group that another engine has made (None: the default group); a collective of them.

        What is made of it is a process group of those ranks that is crossdock's alone: collectives of the engine do not
        meet these, and closing this group leaves the engine's as it is. Raises what `init` does.
        """
        check_timeout(timeout_s)
        if not dist.is_initialized():
            raise ConfigError("torch.distributed is not initialised in this process: use crossdock.init()")
        given = process_group or dist.group.WORLD
        if given is None or dist.get_rank(given) < 0:
            raise ConfigError("this process is no rank of the process group it was given")
        chosen = _device(device, torch.cuda.current_device() if torch.cuda.is_available() else 0)
        rank, world_size = dist.get_rank(given), dist.get_world_size(given)
        _check_topology(topology, world_size)
        if world_size == 1:
            return cls.solo(chosen, timeout_s)
        bond, found = adopt(given, chosen, timeout_s, topology)
        return cls.bound(rank, world_size, chosen, found, timeout_s, bond)

    @classmethod
    def bound(
        cls,
        rank: int,
        world_size: int,
        device: torch.device,
        topology: Topology,
        timeout_s: float,
        bond: Bond,
        members: tuple[int, ...] = (),
    ) -> "EPGroup":
        """The group that `bond` holds together, and that falls apart on every rank when one of them fails."""
        group = cls(rank, world_size, device, None, topology, timeout_s, None, members)
        group.hold(bond)
        return group

    def hold(self, bond: Bond) -> None:
        """From now on `bond` holds this group together; its failure lets go of the process group."""
        object.__setattr__(self, "bond", bond)
        object.__setattr__(self, "process_group", bond.whole.process_group)
        bond.watch.when_failed(lambda: release(self.let_go()))

    @property
    def watch(self) -> Watch | None:
        """What the ranks know of the group's failure, by whatever transport they meet; None where there is none."""
        kept = self.bond or self.communicator  # of both, where torch was started under mpiexec, it is the same
        return kept.watch if kept is not None else None

    def bonded(self) -> Bond:
        """The bond. Raises ConfigError where there is none, or none any more."""
        bond = self.bond
        if bond is None:
            raise ConfigError(f"rank {self.rank}: this group has no process group: it is closed, or never had one")
        return bond

    def abort(self, why: str) -> None:
        """Ends all waits of every rank soon: each raises RankFailure naming this rank and `why`. Waits for nobody."""
        if self.watch is not None:
            self.watch.abort(why)

    def close(self) -> None:
        """Leaves the process group that `init` started, and lets go of it: its threads end with the last reference."""
        watch, kept = self.watch, self.let_go()
        if watch is not None and watch.failure is not None:
            release(kept)  # what is pending may end with nothing but its timeout
        else:
            kept.clear()
        if watch is not None:
            watch.close()
        for held in ("communicator", "bond"):
            object.__setattr__(self, held, None)

    def let_go(self) -> list[Any]:
        """Leaves the process group, and hands over what is left of it: the last reference waits for what is pending."""
        bond = self.bond  # read once: `recover` takes it from another thread
        kept: list[Any] = [] if bond is None else bond.let_go()
        object.__setattr__(self, "process_group", None)
        return kept

    def __enter__(self) -> "EPGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_failure(error):
            self.abort(f"{type(error).__name__}: {error}")
        self.close()


def is_failure(error: BaseException | None) -> bool:
    """Whether the others are to fail with a rank that leaves its group by `error`.

    Not by an exit in good order, nor by a PlanMismatch, which they find in the same numbers.
    """
    if isinstance(error, SystemExit):
        return error.code not in (None, 0)
    return error is not None and not isinstance(error, PlanMismatch)


def init(
    device: torch.device | str | None = None, timeout_s: float = 300.0, topology: Topology | None = None
) -> EPGroup:
    """The group torchrun or mpiexec started this process in, or a group of one where no launcher did.

    Without `device`: this rank's GPU where there is one, else the CPU. Control messages travel by gloo, rows by gloo on
    CPUs and NCCL on GPUs; under mpiexec both travel by MPI. `topology`, the same on all ranks, says which of them share
    a node; without it the hosts' names do. Raises ConfigError for variables that contradict one another or those of
    another rank, and for a device that is absent, CommTimeout where ranks do not arrive within `timeout_s` seconds, and
    RankFailure where one that had come is lost before all are connected.
    """
    check_timeout(timeout_s)
    for rank_name, size_name in MPIEXEC:
        if "RANK" not in os.environ and rank_name in os.environ and _integer(size_name, 1) > 1:
            rank, world_size = _integer(rank_name, 0), _integer(size_name, 1)
            _check_topology(topology, world_size)
            job = join_mpi(rank, world_size, timeout_s, topology)
            return EPGroup(rank, world_size, _device(device, job.local_rank), None, job.topology, timeout_s, job)
    world_size, rank = _integer("WORLD_SIZE", 1), _integer("RANK", 0)
    if world_size < 1:
        raise ConfigError(f"WORLD_SIZE must be at least 1, found {world_size}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK must be in 0..{world_size - 1} (WORLD_SIZE is {world_size}), found {rank}")
    chosen = _device(device, _integer("LOCAL_RANK", 0))
    _check_topology(topology, world_size)
    if world_size == 1:
        return EPGroup.solo(chosen, timeout_s)
    bond, found = join(rank, world_size, chosen, timeout_s, topology, _meeting_point(world_size))
    return EPGroup.bound(rank, world_size, chosen, found, timeout_s, bond)


def check_timeout(timeout_s: float) -> None:
    """Raises ConfigError for a wait that would not end, or be none."""
    if not 0 < timeout_s <= LONGEST_S:  # false for NaN too
        raise ConfigError(f"timeout_s must be above 0 seconds and at most {LONGEST_S:g}, found {timeout_s}")


def _check_topology(topology: Topology | None, world_size: int) -> None:
    if topology is not None and len(topology.node_of_rank) != world_size:
        raise ConfigError(f"topology must place {world_size} ranks, found one of {len(topology.node_of_rank)}")


def _integer(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"environment variable {name} must be an integer, found {value!r}") from None


def _device(device: torch.device | str | None, local_rank: int) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device must be one torch knows, such as 'cpu' or 'cuda', found {device!r}") from None
    if chosen.type == "cuda":
        present = torch.cuda.device_count()
        chosen = torch.device("cuda", chosen.index if chosen.index is not None else local_rank)
        if chosen.index >= present:
            raise ConfigError(f"device {chosen} was asked for, but this machine shows {present} GPUs")
        torch.cuda.set_device(chosen)
    return chosen


def _meeting_point(world_size: int) -> MeetingPoint:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {world_size} but {' and '.join(missing)} is not set: start with torchrun")
    port = _integer("MASTER_PORT", 0)
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT must be in 1..65535, found {port}")
    if dist.is_initialized():
        raise ConfigError("torch.distributed is initialised in this process: close that group before crossdock.init()")
    return MeetingPoint(os.environ["MASTER_ADDR"], port, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
