"""`EPGroup`: the ranks that share one set of experts, and `init`, which builds it from what a launcher set.

Only `init` reads the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
"""

import hashlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group: its defaults would keep it (optimizers import this late)

from crossdock.errors import CommTimeout, ConfigError
from crossdock.parallel.bounded import bounded
from crossdock.parallel.topology import Topology

LONGEST_S = 1e9  # 31 years: torch counts its timeouts in 64-bit nanoseconds
GRACE_S = 5.0  # how long after the timeout torch may still raise an error of its own, which says more


@dataclass(frozen=True)
class EPGroup:
    """This rank, its device, and the process group it shares with the others (None in a group of one and once closed).

    `timeout_s` bounds every wait on another rank, in seconds. Use as a context manager, or call `close`.
    """

    rank: int
    world_size: int
    device: torch.device
    process_group: dist.ProcessGroup | None
    topology: Topology
    timeout_s: float

    @classmethod
    def solo(cls, device: torch.device | str = "cpu", timeout_s: float = 300.0) -> "EPGroup":
        """A group of one, which needs no launcher and starts nothing."""
        return cls(0, 1, torch.device(device), None, Topology((0,)), timeout_s)

    def close(self) -> None:
        """Leaves the process group that `init` started, and lets go of it: its threads end with the last reference."""
        if self.process_group is not None:
            object.__setattr__(self, "process_group", None)
            if dist.is_initialized():
                dist.destroy_process_group()

    def __enter__(self) -> "EPGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def init(device: torch.device | str | None = None, timeout_s: float = 300.0) -> EPGroup:
    """The group torchrun started this process in, or a group of one where no launcher did.

    Without `device`: this rank's GPU where there is one, else the CPU. Control messages travel by gloo, rows by gloo on
    CPUs and NCCL on GPUs. Raises ConfigError for variables that contradict one another or a device that is absent, and
    CommTimeout where the other ranks do not arrive within `timeout_s` seconds.
    """
    if not 0 < timeout_s <= LONGEST_S:  # false for NaN too
        raise ConfigError(f"timeout_s must be above 0 seconds and at most {LONGEST_S:g}, found {timeout_s}")
    world_size, rank = _integer("WORLD_SIZE", 1), _integer("RANK", 0)
    if world_size < 1:
        raise ConfigError(f"WORLD_SIZE must be at least 1, found {world_size}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK must be in 0..{world_size - 1} (WORLD_SIZE is {world_size}), found {rank}")
    chosen = _device(device, _integer("LOCAL_RANK", 0))
    if world_size == 1:
        return EPGroup.solo(chosen, timeout_s)
    topology = _start(rank, world_size, chosen, timeout_s)
    return EPGroup(rank, world_size, chosen, dist.group.WORLD, topology, timeout_s)


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


def _start(rank: int, world_size: int, device: torch.device, timeout_s: float) -> Topology:
    """Meets the other ranks at MASTER_ADDR:MASTER_PORT."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {world_size} but {' and '.join(missing)} is not set: start with torchrun")
    port = _integer("MASTER_PORT", 0)
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT must be in 1..65535, found {port}")
    if dist.is_initialized():
        raise ConfigError("torch.distributed is initialised in this process: close that group before crossdock.init()")
    where = f"{os.environ['MASTER_ADDR']}:{port}"
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"

    def meet() -> Topology:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is a thread's own
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
        return _gather_topology(world_size)

    try:
        return bounded(meet, timeout_s + GRACE_S)
    except dist.DistNetworkError as error:
        what = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ConfigError(f"rank {rank}: cannot meet the other ranks at {where}: {what}") from error
    except (RuntimeError, TimeoutError) as error:
        what = str(error).splitlines()[0]
        raise CommTimeout(
            f"rank {rank}: the {world_size} ranks did not all arrive at {where} within {timeout_s:g} s: {what}"
        ) from error


def _gather_topology(world_size: int) -> Topology:
    """Ranks whose host names agree share a node; names travel as a 63-bit hash."""
    digest = hashlib.sha256(socket.gethostname().encode()).digest()
    mine = torch.tensor([int.from_bytes(digest[:8], "big") >> 1])
    names = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(names, mine)
    return Topology.from_names(tuple(int(name) for name in names))
