"""What the exchange asks of a transport: gather a few integers, and move rows of bytes to the ranks that want them.

Legend: W ranks, S rows sent, R rows received, D row width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.parallel import Topology

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
    @property
    def topology(self) -> Topology:
        """Which of these ranks share a node."""
        ...

    @property
    def members(self) -> tuple[int, ...]:
        """The number each rank has in the world, which is what errors call it; 0..W-1 where this is the world."""
        ...

    def split(self, parts: Sequence[Sequence[int]]) -> "Transport":
        """The transport of the part that holds this rank; in it ranks are numbered anew, in ascending order.

        A collective; `parts`, the same on every rank, divide the ranks: each stands in exactly one, ascending. Raises
        ConfigError where they do not. The parts' collectives are independent of one another and of this transport's.
        """
        ...

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


def check_parts(parts: Sequence[Sequence[int]], world_size: int) -> None:
    """Raises ConfigError unless each rank stands in exactly one part, and each part is ascending."""
    listed = [list(part) for part in parts]
    found = sorted(rank for part in listed for rank in part)
    if found != list(range(world_size)) or any(part != sorted(part) for part in listed):
        raise ConfigError(f"parts must hold each of the ranks 0..{world_size - 1} once, ascending, found {listed}")


def part_topology(topology: Topology, part: Sequence[int]) -> Topology:
    """The nodes of a part's ranks, numbered anew in their order."""
    return Topology.from_names(tuple(topology.node_of_rank[rank] for rank in part))
