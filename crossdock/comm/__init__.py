"""Rows to the rank that wants them, and back; moves bytes and knows no FP8."""

from crossdock.comm.dispatcher import Dispatcher, Inbound
from crossdock.comm.local import LocalTransport, LocalWorld
from crossdock.comm.plan import DispatchPlan
from crossdock.comm.torch_dist import TorchTransport
from crossdock.comm.transport import Pending, Transport
from crossdock.errors import ConfigError
from crossdock.parallel import EPGroup

TRANSPORTS = ("local", "torch", "mpi", "symmetric")


def make_transport(group: EPGroup, name: str = "auto") -> Transport:
    """The transport for `group`: "local" in a group of one, "torch" otherwise, or the one named.

    Raises ConfigError for an unknown name, and for one that cannot serve the group.
    """
    if name == "auto":
        name = "local" if group.world_size == 1 else "torch"
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


__all__ = [
    "TRANSPORTS",
    "DispatchPlan",
    "Dispatcher",
    "Inbound",
    "LocalTransport",
    "LocalWorld",
    "Pending",
    "TorchTransport",
    "Transport",
    "make_transport",
]
