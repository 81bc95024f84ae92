"""What all forms of the exchange share: their calls (`Exchange`), and what rows are and may be (`ExchangeForm`).

Legend: T tokens here, D hidden, K experts per token, P slots, R rows received, X bytes of a row as it travels.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from crossdock.backend import Backend
from crossdock.comm.agreement import DTYPES, HIERARCHIES, MODES, Header
from crossdock.comm.codec import Codec
from crossdock.comm.explain import Sender
from crossdock.comm.inbound import Inbound
from crossdock.comm.plan import check_weights
from crossdock.comm.transport import Pending, Transport
from crossdock.errors import ConfigError


class Exchange(Protocol):
    """The calls of every form, described at `Dispatcher`. A plan is for the form that made it, and so is an inbound."""

    checksum_of_placement: int

    @property
    def transport(self) -> Transport: ...

    def plan(self, slot_ids_TK: Tensor, weights_TK: Tensor | None = None, *, checked: bool = False) -> Any: ...

    def plans(
        self, parts: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, checked: bool = False
    ) -> list[Any]: ...

    def dispatch(self, x_TD: Tensor, plan: Any) -> Inbound: ...

    def dispatch_async(self, x_TD: Tensor, plan: Any) -> Pending[Inbound]: ...

    def combine(self, out_RD: Tensor, weights_TK: Tensor, inbound: Any, plus_TD: Tensor | None = None) -> Tensor: ...

    def combine_async(
        self, out_RD: Tensor, weights_TK: Tensor, inbound: Any, plus_TD: Tensor | None = None
    ) -> Pending[Tensor]: ...


class ExchangeForm:
    """What every form of the exchange is made of: where slots stand, what rows are, and what may be asked of them."""

    hierarchy, mode = "flat", "throughput"

    def __init__(
        self,
        transport: Transport,
        num_slots: int,
        hidden_size: int,
        dtype: torch.dtype,
        backend: Backend = "auto",
        codec: Codec | None = None,
    ) -> None:
        if num_slots < 1 or num_slots % transport.world_size:
            raise ConfigError(f"{num_slots} slots do not divide over {transport.world_size} ranks")
        if dtype not in DTYPES or hidden_size < 1:
            found = f"{hidden_size} values of {dtype}"
            raise ConfigError(f"rows can be at least one value of {', '.join(map(str, DTYPES))}, found {found}")
        self.transport, self.num_slots, self.hidden_size, self.dtype = transport, num_slots, hidden_size, dtype
        self.backend: Backend = backend
        self.codec = codec
        self.row_bytes = hidden_size * dtype.itemsize if codec is None else codec.row_bytes(hidden_size)
        self.sender = Sender(transport.rank, transport.topology, self.row_bytes, hidden_size * dtype.itemsize)
        self.layer = transport.register()
        self.step = 0
        self.checksum_of_placement = 0  # of what stands in the slots, for those who know it

    def header(self, experts_per_token: int, together: int = 1, with_weights: bool = False) -> Header:
        """Of the last `together` exchanges, which were planned together."""
        return Header(
            HIERARCHIES.index(self.hierarchy),
            MODES.index(self.mode),
            self.layer,
            self.step - together + 1,
            together,
            self.num_slots,
            self.hidden_size,
            DTYPES.index(self.dtype),
            self.row_bytes,
            experts_per_token,
            self.checksum_of_placement,
            int(with_weights),
        )

    def encoded(self, x_TD: Tensor) -> Tensor:
        """x as it travels."""
        return x_TD.detach() if self.codec is None else self.codec.encode(x_TD.detach())

    def check_rows(self, name: str, rows: Tensor, count: int) -> None:
        """Raises ConfigError for another shape or dtype."""
        if rows.shape != (count, self.hidden_size) or rows.dtype != self.dtype:
            found = f"{rows.dtype} {list(rows.shape)}"
            raise ConfigError(f"{name} must be {self.dtype} {[count, self.hidden_size]}, found {found}")

    def check_combine(
        self, out_RD: Tensor, rows: int, weights_TK: Tensor, expected: tuple[int, ...], plus_TD: Tensor | None
    ) -> None:
        """Raises ConfigError for another shape, dtype or device."""
        self.check_rows("out_RD", out_RD, rows)
        check_weights(weights_TK, expected, out_RD, "out_RD")
        if plus_TD is not None:
            self.check_rows("plus_TD", plus_TD, len(weights_TK))
            if plus_TD.device != out_RD.device:
                raise ConfigError(f"plus_TD is on {plus_TD.device}, but out_RD is on {out_RD.device}")
