"""Ranks that are not in the same exchange are told apart, and named, before any row moves.

What must be equal travels as a few integers in front of the counts that a plan gathers anyway, so it costs no exchange
of its own.
"""

from dataclasses import dataclass

import torch

from crossdock.comm.transport import Transport
from crossdock.errors import PlanMismatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HIERARCHIES = ("flat", "node")


@dataclass(frozen=True)
class Header:
    """What ranks must agree about. `exchange` counts a dispatcher's plans, `planned_together` are those of one gather,
    `row_bytes` are a row's on the wire.
    """

    hierarchy: int
    layer: int
    exchange: int
    planned_together: int
    slots: int
    hidden_size: int
    dtype: int
    row_bytes: int
    experts_per_token: int

    def values(self) -> list[int]:
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def split(cls, gathered: list[list[int]]) -> tuple[list["Header"], list[list[int]]]:
        """Every rank's header, and what stood behind it."""
        length = len(cls.__dataclass_fields__)
        return [cls(*values[:length]) for values in gathered], [values[length:] for values in gathered]

    def shown(self, name: str) -> str:
        value: int = getattr(self, name)
        names: dict[str, tuple[object, ...]] = {"dtype": DTYPES, "hierarchy": HIERARCHIES}
        return str(names[name][value]) if value in range(len(names.get(name, ()))) else str(value)


def gather_agreed(transport: Transport, header: Header, counts: list[int], phase: str) -> list[list[int]]:
    """Every rank's `counts`, equally many. Raises PlanMismatch where a rank's header is another."""
    headers, gathered = Header.split(transport.all_gather(header.values() + counts, phase))
    for rank, theirs in enumerate(headers):
        for name in header.__dataclass_fields__:
            if getattr(theirs, name) != getattr(header, name):
                me, other = transport.members[transport.rank], transport.members[rank]
                found, expected, what = theirs.shown(name), header.shown(name), name.replace("_", " ")
                raise PlanMismatch(
                    f"rank {me}: {phase}: {what} is {found} on rank {other}, expected {expected} as here"
                )
    return gathered
