"""Ranks that are not in the same exchange are told apart, and named, before any row moves.

What must be equal travels as a few integers in front of the counts that a plan gathers anyway, so it costs no exchange
of its own, but before the first plan, when even the number of counts may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import torch

from crossdock.comm.transport import Transport, check_parts
from crossdock.errors import PlanMismatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HIERARCHIES = ("flat", "node")
MODES = ("throughput", "latency")
OVERFLOWS = ("raise", "grow")
NAMES: dict[str, tuple[object, ...]] = {
    "dtype": DTYPES,
    "hierarchy": HIERARCHIES,
    "mode": MODES,
    "on_overflow": OVERFLOWS,
}
OPTIONS = ("max_tokens", "on_overflow")  # shown as they are written
PHASE_BYTES = 96  # of a phase's name that travel, so that errors can quote it


class Told:
    """Integers that ranks compare, the fields of a dataclass."""

    __dataclass_fields__: dict[str, object]

    def shown(self, name: str) -> str:
        value: int = getattr(self, name)
        return str(NAMES[name][value]) if value in range(len(NAMES.get(name, ()))) else str(value)

    def difference(self, theirs: "Told", rank: int) -> str:
        """Such as: hidden size is 9 on rank 1, expected 8; empty where all is the same."""
        for name in self.__dataclass_fields__:
            if getattr(theirs, name) != getattr(self, name):
                what = name if name in OPTIONS else name.replace("_", " ")
                return f"{what} is {theirs.shown(name)} on rank {rank}, expected {self.shown(name)}"
        return ""


@dataclass(frozen=True)
class Header(Told):
    """What ranks must agree about. `exchange` counts a dispatcher's plans, `planned_together` are those of one gather,
    `row_bytes` are a row's on the wire, `checksum_of_placement` says which expert each slot holds, where a layer knows,
    `plans_with_weights` is 1 where weights travel with the plans. The last three are those of mode latency.
    """

    hierarchy: int
    mode: int
    layer: int
    exchange: int
    planned_together: int
    slots: int
    hidden_size: int
    dtype: int
    row_bytes: int
    experts_per_token: int
    checksum_of_placement: int = 0
    plans_with_weights: int = 0
    max_tokens: int = 0
    capacity: int = 0
    on_overflow: int = 0

    def values(self) -> list[int]:
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def split(cls, gathered: list[list[int]]) -> tuple[list["Header"], list[list[int]]]:
        """Every rank's header, and what stood behind it."""
        length = len(cls.__dataclass_fields__)
        return [cls(*values[:length]) for values in gathered], [values[length:] for values in gathered]


def gather_agreed(transport: Transport, header: Header, counts: list[int], phase: str) -> list[list[int]]:
    """Every rank's `counts`, equally many. Raises PlanMismatch, on every rank, where one's header is another."""
    headers, gathered = Header.split(transport.all_gather(header.values() + counts, phase))
    found = tell_apart(headers, transport)
    if found is not None:
        odd, other, expected = found
        text = headers[other].difference(headers[odd], transport.members[odd])
        raise PlanMismatch(f"rank {transport.members[transport.rank]}: {phase}: {text} {expected}")
    return gathered


def agree_on_parts(transport: Transport, parts: Sequence[Sequence[int]]) -> tuple[int, Sequence[int]]:
    """Which of the parts is this rank's, and its number. A collective.

    Raises ConfigError for parts that do not divide the ranks, and PlanMismatch where a rank has others.
    """
    check_parts(parts, transport.world_size)
    ours = int.from_bytes(sha256(repr([list(part) for part in parts]).encode()).digest()[:8], "big") >> 1
    found = tell_apart(transport.all_gather([ours], "split"), transport)
    if found is not None:
        odd, other, _ = found
        me, who, whom = (transport.members[rank] for rank in (transport.rank, odd, other))
        raise PlanMismatch(f"rank {me}: split: rank {who} has other parts than rank {whom}, found {list(parts)} here")
    return next((number, part) for number, part in enumerate(parts) if transport.rank in part)


def odd_one(told: Sequence[object]) -> tuple[int, int] | None:
    """The first rank that differs from what most tell, and the first of those; None where all tell the same.

    All ranks find the same. Where two things are told equally often, the first rank's counts.

    >>> odd_one("aab"), odd_one("baa"), odd_one("ab"), odd_one("aa")
    ((2, 0), (0, 1), (1, 0), None)
    """
    if all(one == told[0] for one in told):
        return None
    most = max(told, key=told.count)
    return next((rank, told.index(most)) for rank, one in enumerate(told) if one != most)


def tell_apart(told: Sequence[object], transport: Transport) -> tuple[int, int, str] | None:
    """`odd_one` as this rank's error names it: (the odd one, one of most, "as here" or "as on rank 2").

    Where two things are told equally often, this rank's counts.
    """
    mine = told[transport.rank]
    if all(one == mine for one in told):
        return None
    most = max((mine, *told), key=told.count)
    odd, other = next(rank for rank, one in enumerate(told) if one != most), told.index(most)
    return odd, other, "as here" if most == mine else f"as on rank {transport.members[other]}"


def phase_words(phase: str) -> npt.NDArray[np.int64]:
    """The beginning of its name, as integers that `phase_text` reads."""
    return np.frombuffer(phase.encode()[:PHASE_BYTES].ljust(PHASE_BYTES, b"\0"), np.int64)


def phase_text(words: Sequence[int]) -> str:
    return np.array(words, np.int64).tobytes().rstrip(b"\0").decode(errors="ignore")
