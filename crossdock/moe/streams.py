"""Where an exchange runs: on a CPU beside the caller by the transport's doing, on a GPU on a stream of its own.

What packs rows, sends them and puts them in order is launched on the side stream, in the order in which all ranks start
exchanges; events order it against the stream that computes. All layers of a device share the one side stream, because a
transport may receive the oldest exchange under way, another layer's, on the stream of whoever starts or awaits one:
that layer's rows would then be there for a stream that it does not wait for. Virtual ranks stay on their one stream: it
is what orders their kernels against one another's. Rejected: a stream for each direction, as two ranks could then start
the same two exchanges in different orders.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from crossdock.comm import Inbound
from crossdock.comm.transport import Pending, Transport
from crossdock.moe.trace import NoTrace

T = TypeVar("T")


class Place(Protocol):
    """Runs the two halves of an exchange."""

    def start(self, begin: Callable[[], T], *used: Tensor | None) -> T:
        """What `begin` gives; `used` are the tensors that it reads."""
        ...

    def finish(self, pending: Pending[T]) -> T:
        """What was waited for, ready for the caller's stream."""
        ...


class Here:
    """On the caller's own stream."""

    def start(self, begin: Callable[[], T], *used: Tensor | None) -> T:
        return begin()

    def finish(self, pending: Pending[T]) -> T:
        return pending.wait()


class Beside:
    """On the side stream of `device`; `module` is torch.cuda or one with the same members."""

    def __init__(self, device: torch.device, recorder: NoTrace, module: Any = torch.cuda) -> None:
        index = module.current_device() if device.index is None else device.index
        self.device, self.recorder, self.module = torch.device(device.type, index), recorder, module
        self.side = _side_stream(self.device, module)

    def start(self, begin: Callable[[], T], *used: Tensor | None) -> T:
        self.side.wait_stream(self.module.current_stream(self.device))
        for tensor in used:
            if tensor is not None:
                tensor.record_stream(self.side)
        with self.module.stream(self.side):
            return begin()

    def finish(self, pending: Pending[T]) -> T:
        with self.module.stream(self.side):
            value = pending.wait()
        current = self.module.current_stream(self.device)
        with self.recorder.wait("rows"):
            current.wait_stream(self.side)
        for tensor in (value.rows_RD, value.ends_L, value.row_ids_R) if isinstance(value, Inbound) else (value,):
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)
        return value


@cache
def _side_stream(device: torch.device, module: Any) -> Any:
    return module.Stream(device)


def make_place(device: torch.device, transport: Transport, recorder: NoTrace) -> Place:
    """The place for a layer on `device`; where it is a stream, `recorder` is told of the waits for it."""
    alone = transport.world_size == 1 or transport.name == "local"
    return Here() if device.type != "cuda" or alone else Beside(device, recorder)
