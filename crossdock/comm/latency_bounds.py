"""What the low-latency mode's ranks must agree about, and what its waits found, in terms of ranks and numbers.

`Bounds` are compared once, before the first dispatch, because buffers have their size. A `Fingerprint` travels with
every message, as two words: no counts are exchanged on the host, in front of which more could be compared.

Legend: L slots on a rank, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crossdock.comm.agreement import DTYPES, Header, gather_agreed
from crossdock.comm.latency_tracks import TrackForm
from crossdock.comm.one_sided import power_of_two
from crossdock.comm.one_sided_wait import DIFFERENT, TOO_MANY, Awaited
from crossdock.comm.transport import Transport
from crossdock.errors import CapacityOverflow, ConfigError, PlanMismatch

TAG = 1 << 62
STEP_BITS, HIDDEN_BITS, DTYPE_BITS, K_BITS = 40, 24, 4, 12


@dataclass(frozen=True)
class Fingerprint:
    """What a message's words say: layer and step in the first, the rest in the second. Too long numbers wrap."""

    layer: int
    exchange: int
    slots: int
    hidden_size: int
    dtype: int
    experts_per_token: int

    @classmethod
    def of(
        cls, layer: int, exchange: int, slots: int, hidden_size: int, dtype: torch.dtype, top_k: int
    ) -> "Fingerprint":
        return cls(layer, exchange, slots, hidden_size, DTYPES.index(dtype), top_k)

    @classmethod
    def read(cls, words: Sequence[int]) -> "Fingerprint":
        when, form = (word & ~TAG for word in words)
        layer, exchange = when >> STEP_BITS, _low(when, STEP_BITS)
        top_k, form = _low(form, K_BITS), form >> K_BITS
        dtype, form = _low(form, DTYPE_BITS), form >> DTYPE_BITS
        return cls(layer, exchange, form >> HIDDEN_BITS, _low(form, HIDDEN_BITS), dtype, top_k)

    @property
    def words(self) -> tuple[int, int]:
        when = (self.layer << STEP_BITS) | _low(self.exchange, STEP_BITS)
        form = (self.slots << HIDDEN_BITS) | _low(self.hidden_size, HIDDEN_BITS)
        form = (form << DTYPE_BITS) | _low(self.dtype, DTYPE_BITS)
        form = (form << K_BITS) | _low(self.experts_per_token, K_BITS)
        return TAG | _low(when, 62), TAG | _low(form, 62)

    def shown(self, name: str) -> str:
        value: int = getattr(self, name)
        return str(DTYPES[value]) if name == "dtype" and value < len(DTYPES) else str(value)


def _low(value: int, bits: int) -> int:
    return value & ((1 << bits) - 1)


@dataclass
class Bounds:
    """Most tokens of a rank in a call, rows from one rank to another (0: as can occur), and L."""

    max_tokens: int
    capacity: int
    slots: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.capacity < 0:
            found = f"{self.max_tokens} and {self.capacity}"
            raise ConfigError(f"max_tokens must be at least 1 and capacity at least 0, found {found}")

    def agree(self, transport: Transport, header: Header, phase: str) -> None:
        """Raises PlanMismatch where a rank's header or bounds are others. A collective."""
        mine = [self.max_tokens, self.capacity]
        for rank, theirs in enumerate(gather_agreed(transport, header, mine, phase)):
            for name, found, expected in zip(("max_tokens", "capacity"), theirs, mine, strict=True):
                if found != expected:
                    me, other = transport.members[transport.rank], transport.members[rank]
                    raise PlanMismatch(
                        f"rank {me}: {phase}: {name} is {found} on rank {other}, expected {expected} as here"
                    )

    def form(self, top_k: int, row_bytes: int, back_bytes: int) -> TrackForm:
        capacity = self.capacity or self.max_tokens * min(top_k, self.slots)
        return TrackForm(self.slots, capacity, row_bytes, self.max_tokens * top_k, back_bytes)

    def grow(self, found: list[list[int]], capacity: int) -> None:
        """Room for what ranks could not send with that capacity, to the next power of two; the same on every rank."""
        tokens = max(tokens for what, _, tokens in found if what == TOO_MANY)
        rows = max(rows for what, rows, _ in found if what == TOO_MANY)
        if tokens > self.max_tokens:
            self.max_tokens = power_of_two(tokens)
        if rows > capacity:
            self.capacity = power_of_two(rows)


def explain(found: list[list[int]], awaited: Awaited, transport: Transport, phase: str) -> None:
    """Raises PlanMismatch for a rank whose message carries another fingerprint."""
    expected = Fingerprint.read(awaited.words)
    where = f"rank {transport.members[transport.rank]}: {phase}"
    for rank, (what, *words) in enumerate(found):
        if what == DIFFERENT:
            theirs = Fingerprint.read(words)
            names = (name for name in expected.__dataclass_fields__ if getattr(theirs, name) != getattr(expected, name))
            name = next(names, "layer")
            raise PlanMismatch(
                f"{where}: {name.replace('_', ' ')} is {theirs.shown(name)} on rank {transport.members[rank]}, "
                f"expected {expected.shown(name)} as here"
            )


def raise_overflow(found: list[list[int]], awaited: Awaited, transport: Transport, phase: str) -> None:
    """Raises CapacityOverflow, naming the first rank that has too much."""
    where = f"rank {transport.members[transport.rank]}: {phase}"
    for rank, (what, rows, tokens) in enumerate(found):
        who = f"rank {transport.members[rank]}"
        if what == TOO_MANY and tokens > awaited.word3_allowed:
            raise CapacityOverflow(
                f"{where}: {who} has {tokens} tokens, more than max_tokens, {awaited.word3_allowed}: raise it, "
                "or set on_overflow='grow'"
            )
        if what == TOO_MANY:
            raise CapacityOverflow(
                f"{where}: {who} has {rows} rows for one rank, more than the capacity, {awaited.most_allowed}: "
                "raise it, or set on_overflow='grow'"
            )
