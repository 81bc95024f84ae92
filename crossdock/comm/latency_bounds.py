"""What the low-latency mode's ranks must agree about, and what its waits found, in terms of ranks and numbers.

`Bounds` are compared once, before the first dispatch, because buffers have their size. A `Fingerprint` travels with
every message, as two words: no counts are exchanged on the host, in front of which more could be compared.

Legend: L slots on a rank, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from crossdock.comm.agreement import DTYPES, OVERFLOWS, Header, Told, odd_one
from crossdock.comm.latency_tracks import TrackForm, Tracks, Trouble
from crossdock.comm.one_sided import TAG, power_of_two
from crossdock.comm.one_sided_wait import DIFFERENT, TOO_MANY, Awaited
from crossdock.errors import ConfigError
from crossdock.parallel.standing import Failure, Turn

STEP_BITS, HIDDEN_BITS, DTYPE_BITS, K_BITS = 40, 24, 4, 12
Found = list[list[int]]  # the status of each source


@dataclass(frozen=True)
class Fingerprint(Told):
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


def _low(value: int, bits: int) -> int:
    return value & ((1 << bits) - 1)


@dataclass
class Bounds:
    """Most tokens of a rank in a call, rows from one rank to another (0: as can occur), L, and what happens beyond.

    `tracks` are the buffers that have this room. Layers of one form that may grow share one of these.
    """

    max_tokens: int
    capacity: int
    slots: int
    on_overflow: str = "raise"
    tracks: Tracks | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.capacity < 0:
            found = f"{self.max_tokens} and {self.capacity}"
            raise ConfigError(f"max_tokens must be at least 1 and capacity at least 0, found {found}")
        if self.on_overflow not in OVERFLOWS:
            raise ConfigError(f"on_overflow must be one of {OVERFLOWS}, found {self.on_overflow!r}")

    def told_in(self, header: Header) -> Header:
        """With what ranks must agree about here."""
        on_overflow = OVERFLOWS.index(self.on_overflow)
        return replace(header, max_tokens=self.max_tokens, capacity=self.capacity, on_overflow=on_overflow)

    def form(self, top_k: int, row_bytes: int, back_bytes: int) -> TrackForm:
        capacity = self.capacity or self.max_tokens * min(top_k, self.slots)
        return TrackForm(self.slots, capacity, row_bytes, self.max_tokens * top_k, back_bytes)

    def grow(self, found: Found, top_k: int) -> None:
        """Room for what ranks could not send, to the next power of two; the same on every rank, and never less.

        What could not be sent may fit by now: a dispatch that was under way at the same time has grown it.
        """
        tokens = max(tokens for what, _, tokens, *_ in found if what == TOO_MANY)
        rows = max(rows for what, rows, *_ in found if what == TOO_MANY)
        if tokens > self.max_tokens:
            self.max_tokens = power_of_two(tokens)
        if rows > self.form(top_k, 1, 1).capacity:
            self.capacity = power_of_two(rows)


def phase_of(what: str, exchange: int, layer: int) -> str:
    return f"{what} of latency exchange {exchange} in MoE layer {layer}"


def earliest(troubles: Sequence[Trouble]) -> tuple[Found, Awaited, Turn]:
    """Of all that waits on the device found amiss, the first exchange's: each source's status in it, and its turn."""

    def order(trouble: Trouble, words: Sequence[int]) -> tuple[int, int, bool]:
        awaited = Fingerprint.read(words)
        return awaited.exchange, awaited.layer, trouble.what == "combine"

    seen = [(order(trouble, row[3:]), trouble) for trouble in troubles for row in trouble.found if row[0]]
    (exchange, layer, _), trouble = min(seen, key=lambda one: one[0])
    found = [
        row if row[0] and order(trouble, row[3:])[:2] == (exchange, layer) else [0] * len(row) for row in trouble.found
    ]
    words = next(row[3:] for row in found if row[0])
    tokens = trouble.form.back_rows // max(1, Fingerprint.read(words).experts_per_token)
    phase = phase_of(trouble.what, exchange, layer)
    turn = next((turn for turn in reversed(trouble.turns) if turn.phase == phase), trouble.turns[-1])
    return found, Awaited((words[0], words[1]), trouble.form.capacity, tokens), turn._replace(phase=phase)


def mismatch(found: Found, members: Sequence[int]) -> Failure | None:
    """The failure where a rank's message carries another fingerprint than most; all ranks find the same."""
    awaited = next((tuple(row[3:5]) for row in found if row[0] == DIFFERENT), None)
    odd = odd_one([tuple(row[1:3]) if row[0] == DIFFERENT else awaited for row in found])
    if awaited is None or odd is None:
        return None
    theirs, ours = (found[rank][1:3] if found[rank][0] == DIFFERENT else awaited for rank in odd)
    who, other = (members[rank] for rank in odd)
    text = Fingerprint.read(ours).difference(Fingerprint.read(theirs), who)
    text = f"{text} as on rank {other}" if text else f"rank {who} is in another exchange than rank {other}"
    return Failure("mismatch", (who,), text, other)


def overflow(found: Found, awaited: Awaited, members: Sequence[int], rank: int) -> Failure | None:
    """The failure where ranks have too much, naming the first of them; as rank `rank` tells it."""
    for member, (what, rows, tokens, *_) in zip(members, found, strict=True):
        if what == TOO_MANY:
            too_many = f"{rows} rows for one rank, more than the capacity, {awaited.most_allowed}"
            if tokens > awaited.word3_allowed:
                too_many = f"{tokens} tokens, more than max_tokens, {awaited.word3_allowed}"
            text = f"rank {member} has {too_many}: raise it, or set on_overflow='grow'"
            return Failure("overflow", (member,), text, rank)
    return None
