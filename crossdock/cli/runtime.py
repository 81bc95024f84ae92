"""Joins the ranks of a command: device, threads and transport, each with the reason for its choice."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from crossdock.cli.launch import RANK_THREADS
from crossdock.comm import Transport, make_transport
from crossdock.errors import ConfigError
from crossdock.parallel import EPGroup, init


@dataclass(frozen=True)
class Runtime:
    """This rank's place among the others. `why` explains "device" and "transport" in a few words each."""

    group: EPGroup
    transport: Transport
    why: dict[str, str] = field(default_factory=dict)


@contextmanager
def join_ranks(device: str | None, transport: str, timeout_s: float) -> Iterator[Runtime]:
    """Joins the other ranks and leaves the group afterwards, but not after an error: leaving could wait for them."""
    local_ranks = _local_ranks()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(RANK_THREADS)
    chosen, why_device = choose_device(device, local_ranks)
    group = init(chosen, timeout_s)
    link = make_transport(group, transport)
    why_transport = "asked for" if transport != "auto" else _why_transport(group)
    yield Runtime(group, link, {"device": why_device, "transport": why_transport})
    group.close()


def _local_ranks() -> int:
    value = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"environment variable LOCAL_WORLD_SIZE must be an integer of at least 1, found {value!r}")
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
    return f"{group.world_size} ranks on {'NCCL' if group.device.type == 'cuda' else 'gloo'}"
