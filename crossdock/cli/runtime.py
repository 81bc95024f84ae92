"""Joins the ranks of a command: device, threads and transport, each with the reason for its choice."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from crossdock.cli.launch import RANK_THREADS
from crossdock.comm import Transport, make_transport
from crossdock.errors import ConfigError
from crossdock.memory import keep_freed_memory
from crossdock.parallel import EPGroup, init
from crossdock.parallel.group import is_failure
from crossdock.parallel.mpi_launch import library_name

# How many ranks this machine has, as torchrun and our launcher, MPICH's and Open MPI's mpiexec say.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


@dataclass(frozen=True)
class Runtime:
    """This rank's place among the others. `why` explains "device" and "transport" in a few words each."""

    group: EPGroup
    transport: Transport
    why: dict[str, str] = field(default_factory=dict)


@contextmanager
def join_ranks(device: str | None, transport: str, timeout_s: float) -> Iterator[Runtime]:
    """Joins the other ranks and leaves the group afterwards, also by an exit in good order.

    After an error it tells them so and does not wait.
    """
    local_ranks = _local_ranks()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(RANK_THREADS)
    chosen, why_device = choose_device(device, local_ranks)
    group = init(chosen, timeout_s)
    if group.device.type == "cpu" and group.world_size > 1:
        keep_freed_memory()
    link = make_transport(group, transport)
    why_transport = "asked for" if transport != "auto" else _why_transport(group)
    try:
        yield Runtime(group, link, {"device": why_device, "transport": why_transport})
    except BaseException as error:
        if is_failure(error):
            group.abort(f"{type(error).__name__}: {error}")
        elif isinstance(error, SystemExit):
            group.close()
        raise
    group.close()


def _local_ranks() -> int:
    name = next((name for name in LOCAL_SIZES if name in os.environ), LOCAL_SIZES[0])
    value = os.environ.get(name, "1")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"environment variable {name} must be an integer of at least 1, found {value!r}")
    return int(value)


def choose_device(device: str | None, local_ranks: int) -> tuple[str, str]:
    """("cpu" or "cuda", why): a GPU where every rank of this machine can have one of its own.

    Raises ConfigError where another kind of device is asked for.
    """
    if device is not None:
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"--device must be cpu or cuda, found {device!r}")
        return device, "asked for"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus >= local_ranks:
        return "cuda", f"a GPU for each of this machine's ranks: {gpus} for {local_ranks}"
    if gpus:
        return "cpu", f"{local_ranks} ranks need a GPU each and this machine has {gpus}"
    built = "torch sees no GPU" if torch.version.cuda or torch.version.hip else "this torch is built for CPUs"
    return "cpu", built


def _why_transport(group: EPGroup) -> str:
    if group.world_size == 1:
        return "one rank: rows stay in this process"
    if group.communicator is not None:
        return f"{group.world_size} ranks on {library_name(group.communicator.mpi)}"
    return f"{group.world_size} ranks on {'NCCL' if group.device.type == 'cuda' else 'gloo'}"
