"""Rows to the rank that wants them, and back; moves bytes and knows no FP8."""

from typing import Literal

import torch

from crossdock.backend import Backend
from crossdock.comm.agreement import HIERARCHIES
from crossdock.comm.codec import Codec
from crossdock.comm.dispatcher import Dispatcher
from crossdock.comm.explain import Traffic, summed
from crossdock.comm.form import Exchange
from crossdock.comm.hierarchy import HierarchicalDispatcher
from crossdock.comm.inbound import Inbound
from crossdock.comm.local import LocalTransport, LocalWorld
from crossdock.comm.plan import DispatchPlan
from crossdock.comm.torch_dist import TorchTransport
from crossdock.comm.transport import Pending, Transport
from crossdock.errors import ConfigError
from crossdock.parallel import EPGroup
from crossdock.parallel.mpi_launch import start_torch

TRANSPORTS = ("local", "torch", "mpi", "symmetric")


def make_transport(group: EPGroup, name: str = "auto") -> Transport:
    """The transport for `group`, or the one named: by default "local" in a group of one, "mpi" where mpiexec started
    it, "torch" otherwise. A collective.

    Raises ConfigError for an unknown name, and for one that cannot serve the group; RankFailure or CommTimeout where
    another rank is lost, or does not come.
    """
    if name == "auto":
        name = "local" if group.world_size == 1 else "torch" if group.communicator is None else "mpi"
    if name in ("torch", "symmetric") and group.communicator is not None and group.bond is None:
        start_torch(group)
    if name == "torch":
        return TorchTransport(group)
    if name == "mpi":
        from crossdock.comm.mpi import MpiTransport  # needs mpi4py, which is an extra

        return MpiTransport(group)
    if name == "symmetric":
        from crossdock.comm.symmetric import SymmetricTransport

        return SymmetricTransport(group)
    if name != "local":
        raise ConfigError(f"transport must be 'auto' or one of {TRANSPORTS}, found {name!r}")
    if group.world_size > 1:
        raise ConfigError(f"transport 'local' serves one process, found a group of {group.world_size} ranks")
    return LocalTransport(group.timeout_s)


def make_dispatcher(
    transport: Transport,
    num_slots: int,
    hidden_size: int,
    dtype: torch.dtype,
    backend: Backend = "auto",
    *,
    hierarchy: Literal["flat", "node"] = "flat",
    mode: Literal["throughput", "latency"] = "throughput",
    codec: Codec | None = None,
    max_tokens: int = 128,
    capacity: int = 0,
    on_overflow: Literal["raise", "grow"] = "raise",
) -> Exchange:
    """The form of the exchange that the options ask for; a collective where `hierarchy` is "node".

    Where all ranks share a node nothing crosses, and "node" is "flat". In a world of one nothing travels, and mode
    "latency" is "throughput". `max_tokens`, `capacity` and `on_overflow` bound the buffers of mode "latency". Raises
    ConfigError for an unknown name, and for what the form asked for raises it for.
    """
    if hierarchy not in HIERARCHIES or mode not in ("throughput", "latency"):
        raise ConfigError(f"hierarchy must be one of {HIERARCHIES} and mode throughput or latency, found {hierarchy!r} "
                          f"and {mode!r}")  # fmt: skip
    common = transport, num_slots, hidden_size, dtype, backend
    if mode == "latency" and transport.world_size > 1:
        from crossdock.comm.latency import LatencyDispatcher  # its kernels, only where they are asked for

        return LatencyDispatcher(*common, codec, max_tokens=max_tokens, capacity=capacity, on_overflow=on_overflow)
    if hierarchy == "node" and transport.topology.num_nodes > 1:
        return HierarchicalDispatcher(*common, codec)
    return Dispatcher(*common, codec)


__all__ = [
    "TRANSPORTS",
    "Codec",
    "DispatchPlan",
    "Dispatcher",
    "Exchange",
    "HierarchicalDispatcher",
    "Inbound",
    "LocalTransport",
    "LocalWorld",
    "Pending",
    "TorchTransport",
    "Traffic",
    "Transport",
    "make_dispatcher",
    "make_transport",
    "summed",
]
