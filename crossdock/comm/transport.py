"""What the exchange asks of a transport: gather a few integers, and move rows of bytes to the ranks that want them.

Legend: W ranks, S rows sent, R rows received, D row width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Pending(Protocol[T_co]):
    """Something that was started and is waited for once."""

    def wait(self) -> T_co: ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """A Pending that needs no waiting."""

    value: T

    def wait(self) -> T:
        return self.value


@dataclass(frozen=True)
class Then(Generic[T]):
    """A Pending whose value is computed when it is waited for."""

    finish: Callable[[], T]

    def wait(self) -> T:
        return self.finish()


class Transport(Protocol):
    """One rank's way to the others. Every method is a collective: all ranks call it in the same order.

    `timeout_s` bounds every wait in seconds; a wait that runs out raises CommTimeout, and a rank found dead raises
    RankFailure, both naming `phase`; after either the transport is of no further use. Rows handed over are not written
    to until every rank has waited for them.
    """

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...

    def register(self) -> int:
        """A number for a user of this transport, in the order of the calls: 0, 1, ..."""
        ...

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        """Every rank's int64 values, by rank; all ranks must give equally many, which is not checked."""
        ...

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        """Sends the first send_counts[0] rows to rank 0, the next to rank 1, ...; gives [R, D] by source rank.

        Any dtype: rows travel as bytes. recv_counts[r] is what rank r sends here.
        """
        ...
