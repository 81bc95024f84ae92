"""`Tracks`: buffers of the low-latency mode, of one form for all layers that have it, so that depth costs no memory.

A track has a box for rows on their way to experts and one for results on their way back, and carries one dispatch and
its combine at a time. That order alone keeps a box from being written while it is read. A rank sends the next dispatch
on a track when it has received the combine, which the others sent behind their experts' reading of this dispatch. And
they send the next combine when they have received that next dispatch, which stands behind the sum over this combine.
Two tracks let two batches overlap. Which one is next is the host's choice, and equal on all ranks; how often a box was
used is counted on the device, so that a captured graph can be replayed.

Legend: W ranks, L slots a rank, C most rows from one rank to another, T tokens, K experts per token.
"""

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.comm.one_sided import Box
from crossdock.comm.one_sided_wait import Awaited
from crossdock.comm.symmetric_heap import FIRST, SymmetricHeap
from crossdock.comm.symmetric_mailbox import Mailbox
from crossdock.errors import ConfigError
from crossdock.parallel.standing import REMEMBERED, Turn

TRACKS = 2
TRIAL_POLLS = 20_000  # timed once, to know how many polls a GPU makes in a second


@dataclass(frozen=True)
class TrackForm:
    """slots is L, capacity C, row_bytes those of a row sent; back_rows is most tokens times K, of back_bytes each."""

    slots: int
    capacity: int
    row_bytes: int
    back_rows: int
    back_bytes: int

    @property
    def region_rows(self) -> int:
        """Rows of a region: C, or somewhat more, so that regions of whole rows begin at multiples of 128 bytes."""
        step = 128 // math.gcd(128, self.row_bytes)
        return -(-self.capacity // step) * step

    def boxes(self, world_size: int) -> list[tuple[Box, Box]]:
        """(out, back) of each track; out carries L + 1 numbers a rank, see `arrange_rows`."""
        pairs, at = [], FIRST
        for _ in range(TRACKS):
            out = Box(at, world_size, self.slots + 1, self.region_rows * self.row_bytes)
            back = Box(out.end, world_size, 0, self.back_rows * self.back_bytes, shared=True)
            pairs.append((out, back))
            at = back.end
        return pairs

    def nbytes(self, world_size: int) -> int:
        return self.boxes(world_size)[-1][1].end


@dataclass(eq=False)
class Track:
    """`busy` from a dispatch until its combine has been received; `awaits` that combine, until it has been sent."""

    out: Mailbox
    back: Mailbox
    busy: bool = False
    awaits: object = None


class Trouble(NamedTuple):
    """What waits of one box on the device found amiss: `found` is the status of each source, `turns` the last waits."""

    form: TrackForm
    what: str
    found: list[list[int]]
    turns: tuple[Turn, ...]


class Tracks:
    """Tracks of one form in `heap`; polls_per_s is how often a GPU looks at a counter in a second."""

    def __init__(self, form: TrackForm, heap: SymmetricHeap) -> None:
        self.form = form
        self.all = [Track(Mailbox(heap, out), Mailbox(heap, back)) for out, back in form.boxes(len(heap.peers))]
        self._turn = 0
        self._posted: dict[Mailbox, Tensor] = {}
        self._turns: dict[Mailbox, deque[Turn]] = {}
        self.polls_per_s = 0.0
        if heap.device.type != "cpu":
            for box in (box for track in self.all for box in (track.out, track.back)):
                self._posted[box] = torch.zeros(box.status.shape, dtype=torch.int64, pin_memory=True)
            self.polls_per_s = _polls_per_s(self.all[0].out)

    def take(self, where: str) -> Track:
        """The next track. Raises ConfigError where it still carries an earlier exchange."""
        track = self.all[self._turn % TRACKS]
        if track.busy:
            raise ConfigError(f"{where}: {TRACKS} dispatches of latency mode are under way: wait for a combine first")
        track.busy, track.awaits = True, object()
        self._turn += 1
        return track

    def put_back(self, track: Track) -> None:
        """Undoes the last `take`: nothing has been sent."""
        track.busy = False
        self._turn -= 1

    def post(self, box: Mailbox, turn: Turn) -> None:
        """Has the device copy what its wait for this found to where the host sees it; neither waits for the other."""
        self._posted[box].copy_(box.status, non_blocking=True)
        self._turns.setdefault(box, deque(maxlen=REMEMBERED)).append(turn)

    def troubled(self) -> list[Trouble]:
        """What waits are known to have found amiss, by box; does not wait for them."""
        return [
            Trouble(
                self.form, "combine" if box.box.shared else "dispatch", box.status[:-1].tolist(), (*self._turns[box],)
            )
            for box, posted in self._posted.items()
            if posted[-1, 0]
        ]


def _polls_per_s(box: Mailbox) -> float:
    """Times a wait for what never comes, on counters of its own."""
    consumed_W, status = box.consumed_W, box.status
    box.consumed_W, box.status = consumed_W + (1 << 40), torch.zeros_like(status)
    try:
        for polls in (1, TRIAL_POLLS):  # the first one compiles
            box.status.zero_()
            torch.cuda.synchronize()
            began = time.perf_counter()
            box.await_on_device(Awaited((0, 0), 0, 0), polls)
            torch.cuda.synchronize()
    finally:
        box.consumed_W, box.status = consumed_W, status
    return TRIAL_POLLS / (time.perf_counter() - began)
