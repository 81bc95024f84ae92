"""The `symmetric` transport: kernels store rows straight into the other ranks' memory, and signal.

Between GPUs it runs over torch symmetric memory, in one NVLink domain or on one GPU; between CPU processes of one
machine the same kernels are interpreted over shared memory. What goes over the host (`all_gather`, start-up, who is to
blame for a wait) is the `torch` transport's.

Exchange n uses box n % BUFFERS of every rank. No rank needs to be asked whether it has emptied one: a rank receives
exchange n - IN_FLIGHT before it sends n. So what it receives in n - IN_FLIGHT was sent after its sender had received
n - 2 * IN_FLIGHT, which is the exchange that stood in that box.

A region holds what one rank sends another. Where one is too small, each message says so, and all ranks alike allocate
larger ones and send again what is under way. Rejected: an acknowledgement for each box, one more signal and wait an
exchange; and sizes gathered on the host first, a round trip an exchange.

On a GPU all is launched on the current stream: a caller who wants rows to travel beside its computing calls from a
stream of its own, the same one for both halves of an exchange.

Legend: W ranks, S rows sent, R rows received, D row width, B bytes of a row.
"""

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from crossdock.comm.agreement import PHASE_BYTES, odd_one, phase_text, phase_words
from crossdock.comm.latency_bounds import Bounds
from crossdock.comm.latency_tracks import TrackForm, Tracks
from crossdock.comm.local import LocalTransport
from crossdock.comm.one_sided import TAG, Box, Parcel, power_of_two
from crossdock.comm.one_sided_wait import DIFFERENT, TOO_MANY, Awaited
from crossdock.comm.symmetric_heap import FIRST, SymmetricHeap
from crossdock.comm.symmetric_mailbox import Mailbox, ended, make_line
from crossdock.comm.torch_dist import TorchTransport
from crossdock.comm.transport import Pending, Then, Transport, bytes_of
from crossdock.errors import CrossdockError
from crossdock.parallel import EPGroup
from crossdock.parallel.standing import Failure, Turn

IN_FLIGHT = 2
BUFFERS = 2 * IN_FLIGHT
LEAST_REGION = 1 << 12  # bytes
ANY = TAG - 1  # a bound that nothing exceeds


@dataclass
class _Exchange:
    """One call of all_to_all_rows; `number` counts them."""

    number: int
    turn: Turn
    rows_SB: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    out_RB: Tensor
    done: bool = False


class SymmetricTransport:
    """Rows through memory that all ranks of `group` map. Serves a group of one too.

    Exchanges under way are received in the order in which they were started, whichever is waited for first. Raises
    ConfigError, at the first exchange, where ranks do not share a machine (CPUs) or an NVLink domain (GPUs).
    """

    name = "symmetric"

    def __init__(self, group: EPGroup) -> None:
        alone = group.process_group is None and group.world_size == 1
        self._join(LocalTransport(group.timeout_s) if alone else TorchTransport(group, self.name), group.device)

    def _join(self, control: Transport, device: torch.device) -> None:
        self.control, self.device, self.line = control, device, make_line(control)
        self.rank, self.world_size, self.timeout_s = control.rank, control.world_size, control.timeout_s
        self.topology, self.members = control.topology, control.members
        self.grown: dict[tuple[TrackForm, int], Bounds] = {}  # of latency mode: layers of one form and K grow as one
        self._tracks: dict[TrackForm, Tracks] = {}
        self._boxes: list[Mailbox] = []
        self._flying: deque[_Exchange] = deque()
        self._started = 0
        self._mismatch: CrossdockError | None = None

    def split(self, parts: Sequence[Sequence[int]]) -> Transport:
        """As of every transport; a part with ranks of several nodes gets the transport that reaches those."""
        part = self.control.split(parts)
        if part.topology.num_nodes > 1:
            return part
        mine = SymmetricTransport.__new__(SymmetricTransport)
        mine._join(part, self.device)
        return mine

    def register(self) -> int:
        return self.control.register()

    def abort(self, why: str) -> None:
        self.control.abort(why)

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        return self.control.all_gather(values, phase)

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        rows_SB = bytes_of(rows_SD)
        out_RB = rows_SB.new_empty(sum(recv_counts), rows_SB.shape[1])
        turn = self.line.enter(phase)  # not before there is room for what arrives
        if self._mismatch is not None:
            raise self._mismatch
        exchange = _Exchange(self._started, turn, rows_SB, send_counts, recv_counts, out_RB)
        if not self._boxes:
            mine = max(self._leaving(exchange)) * rows_SB.shape[1]
            self._allocate(max(size for (size,) in self.all_gather([mine], phase)), phase)
        while len(self._flying) >= IN_FLIGHT:
            self._receive(self._flying[0])
        self._send(exchange)
        self._started += 1
        self._flying.append(exchange)

        def finish() -> Tensor:
            while not exchange.done:
                self._receive(self._flying[0])
            return out_RB.view(rows_SD.dtype)

        return Then(finish)

    def tracks(self, form: TrackForm, phase: str) -> Tracks:
        """The bounded buffers of that form, which all layers share. A collective where they are not there yet."""
        if form not in self._tracks:
            heap = SymmetricHeap.open(self.control, self.device, form.nbytes(self.world_size), phase)
            self._tracks[form] = Tracks(form, heap)
        return self._tracks[form]

    def all_tracks(self) -> tuple[Tracks, ...]:
        return tuple(self._tracks.values())

    def _allocate(self, region_bytes: int, phase: str) -> None:
        """Boxes with room for that much from one rank. A collective."""
        region_bytes, words = max(LEAST_REGION, power_of_two(region_bytes)), 1 + PHASE_BYTES // 8
        boxes, at = [], FIRST
        for _ in range(BUFFERS):
            boxes.append(Box(at, self.world_size, words, region_bytes))
            at = boxes[-1].end
        heap = SymmetricHeap.open(self.control, self.device, at, phase)
        self._boxes = [Mailbox(heap, box) for box in boxes]

    def _leaving(self, exchange: _Exchange) -> list[int]:
        """Rows for each rank; none for this one, as those do not leave its memory."""
        return [0 if rank == self.rank else count for rank, count in enumerate(exchange.send_counts)]

    def _send(self, exchange: _Exchange) -> None:
        leaving = self._leaving(exchange)
        ends = list(accumulate(exchange.send_counts))
        starts = [end - count for end, count in zip(ends, exchange.send_counts, strict=True)]
        message = np.zeros((self.world_size, 1 + PHASE_BYTES // 8), np.int64)
        message[:, 0] = leaving
        message[:, 1:] = phase_words(exchange.turn.phase)
        places_2W = torch.tensor([starts, [start + count for start, count in zip(starts, leaving, strict=True)]])
        first_W, last_W = places_2W.to(self.device).unbind(0)
        message_WM = torch.from_numpy(message).to(self.device)
        awaited, rows_SB = self._awaited(exchange), exchange.rows_SB
        words = *awaited.words, rows_SB.shape[1]
        self._box(exchange).send(Parcel(rows_SB, first_W, last_W, words, awaited.most_allowed, message_WM=message_WM))

    def _box(self, exchange: _Exchange) -> Mailbox:
        return self._boxes[exchange.number % BUFFERS]

    def _awaited(self, exchange: _Exchange) -> Awaited:
        words = TAG | exchange.number, TAG | zlib.crc32(exchange.turn.phase.encode())
        row_bytes = max(1, exchange.rows_SB.shape[1])
        return Awaited(words, self._box(exchange).box.region_bytes // row_bytes, ANY)

    def _receive(self, exchange: _Exchange) -> None:
        """Receives the oldest exchange under way."""
        if self._mismatch is not None:
            raise self._mismatch
        while True:
            box = self._box(exchange)
            found = box.receive(self._awaited(exchange), self.line, exchange.turn)
            messages: list[list[int]] = box.messages.tolist()
            self._check(exchange, found, messages)
            if not any(what == TOO_MANY for what, *_ in found):
                break
            self._allocate(max(most * row_bytes for _, _, most, row_bytes, *_ in messages), exchange.turn.phase)
            for again in self._flying:
                self._send(again)
        self._copy_out(exchange, box)
        exchange.done = True
        self._flying.popleft()

    def _check(self, exchange: _Exchange, found: list[list[int]], messages: list[list[int]]) -> None:
        """Raises PlanMismatch where a rank is in another exchange, or sends another number of rows or bytes.

        It is the group's failure: what was sent behind it fits together no more.
        """
        row_bytes = exchange.rows_SB.shape[1]
        odd, text = None, ""
        if any(what == DIFFERENT for what, *_ in found):
            odd = odd_one([message[:2] for message in messages])
            text = f"is elsewhere: {phase_text(messages[odd[0]][5:])}" if odd else ""
        elif (odd := odd_one([message[3] for message in messages])) is not None:
            text = f"sends rows of {messages[odd[0]][3]} bytes, expected {messages[odd[1]][3]}"
        else:
            for rank, (message, expected) in enumerate(zip(messages, exchange.recv_counts, strict=True)):
                if odd is None and rank != self.rank and message[4] != expected:
                    odd, text = (rank, self.rank), f"sends {message[4]} rows of {row_bytes} bytes, expected {expected}"
        if odd is not None:
            who, other = (self.members[rank] for rank in odd)
            failure = Failure("mismatch", (who,), f"rank {who} {text}", other)
            self._mismatch = ended(self.line, failure, exchange.turn.phase)
            raise self._mismatch

    def _copy_out(self, exchange: _Exchange, box: Mailbox) -> None:
        """Out of the box, which is used again, into the result; this rank's own rows from where they are."""
        row_bytes = exchange.rows_SB.shape[1]
        own = sum(exchange.send_counts[: self.rank])
        end = 0
        for rank, count in enumerate(exchange.recv_counts):
            start, end = end, end + count
            if count and rank == self.rank:
                exchange.out_RB[start:end] = exchange.rows_SB[own : own + count]
            elif count:
                exchange.out_RB[start:end] = box.rows(rank, (count, row_bytes), torch.uint8)
