"""What the exchange asks of a transport: gather a few integers, and move rows of bytes to the ranks that want them.

Legend: W ranks, S rows sent, R rows received, D row width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
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
    """A Pending whose value is computed when it is waited for.

    Where `on_arrival` is given, on_arrival(call) has `call` called once what is waited for is there, on a GPU within a
    stream that has it; from another thread, perhaps.
    """

    finish: Callable[[], T]
    on_arrival: Callable[[Callable[[], None]], None] | None = None

    def wait(self) -> T:
        return self.finish()


class Transport(Protocol):
    """One rank's way to the others. All but `abort` and `register` are collectives: all ranks call them in one order.

    `timeout_s` bounds every wait in seconds. A wait that runs out raises CommTimeout, and one for a rank that is gone
    or does not answer raises RankFailure; both name the rank to blame and `phase`. The first such error, on whichever
    rank, is the end of every transport of the group, parts included: all waits end, and each further use raises it
    again. Rows handed over are not written to until every rank has waited for them.
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

    def abort(self, why: str) -> None:
        """Ends all waits of every rank soon: each raises RankFailure naming this rank and `why`. Waits for nobody."""
        ...

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        """Every rank's int64 values, by rank. Raises PlanMismatch, for good, where a rank gives another number."""
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


def bytes_of(rows_SD: Tensor) -> Tensor:
    """Rows as uint8 [S, bytes of a row], without a copy where they lie together.

    Where S or D is 1 or 0 torch calls rows contiguous whatever their strides, and still refuses to view them so.
    """
    rows_SD = rows_SD.contiguous()
    if rows_SD.stride(-1) != 1:
        rows_SD = rows_SD.clone(memory_format=torch.contiguous_format)
    return rows_SD.view(torch.uint8)
