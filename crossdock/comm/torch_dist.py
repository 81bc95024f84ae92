"""The `torch` transport: torch.distributed, gloo between CPUs and NCCL between GPUs.

Legend: S rows sent, R rows received, D row width.

Rows travel as uint8 views, because gloo refuses float8 and because an exchange of bytes changes no bits. The backends
are called directly: torch.distributed's functions check what was checked here already, at 10 us a call. A wait is a
`Channel`'s: it ends when the group fails anywhere, and names the rank to blame.

Gloo ends the process where a rank gets more bytes than it expects, and leaves garbage where it gets less. So all
messages of a gather are equally long, as long as any was so far (up to MOST_ROOM integers), and begin with a tag:

    true length | checksum of this transport's name and all its phases so far | this phase's name | values | padding

Ranks that gather other numbers of integers are told apart by it, and so are ranks that have come by other exchanges:
those that moved rows in another order got wrong ones, and learn it at the next gather, which is the next plan's.
"""

import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossdock.comm.agreement import PHASE_BYTES, agree_on_parts, odd_one, phase_text, phase_words
from crossdock.comm.gloo_rows import GlooRows
from crossdock.comm.transport import Pending, Then, bytes_of, part_topology
from crossdock.errors import ConfigError
from crossdock.parallel import EPGroup, Topology
from crossdock.parallel.bond import Links
from crossdock.parallel.standing import Failure, Turn
from crossdock.parallel.watch import SLICE_S

SLICE = timedelta(seconds=SLICE_S)
TAG_WORDS = 2 + PHASE_BYTES // 8
FIRST_ROOM, MOST_ROOM = 32, 1 << 12  # integers in a gather's messages: at first, and at most for good


class TorchTransport:
    """Collectives over `group`'s process group. Raises ConfigError for a group of one, which has none."""

    name = "torch"

    def __init__(self, group: EPGroup, kind: str = "torch") -> None:
        """`kind`: of the transport that ranks have made, where this one is only a part of it."""
        if group.bond is None:
            raise ConfigError("transport 'torch' needs a process group: start with torchrun and call crossdock.init()")
        bond = group.bonded()
        self._place(group, bond.whole, bond.name(kind), group.members, group.topology)

    def _place(self, group: EPGroup, links: Links, name: str, members: tuple[int, ...], topology: Topology) -> None:
        self._group, self._links = group, links
        self.members, self.topology = members, topology
        self.rank, self.world_size = members.index(group.members[group.rank]), len(members)
        self.timeout_s = group.timeout_s
        self._channel = group.bonded().watch.channel(name, members, group.timeout_s)
        self._users = self._splits = 0
        self._room, self._so_far = FIRST_ROOM, zlib.crc32(name.encode())

    def abort(self, why: str) -> None:
        self._channel.watch.abort(why)

    def split(self, parts: Sequence[Sequence[int]]) -> "TorchTransport":
        number, part = agree_on_parts(self, parts)
        self._splits += 1
        name = f"{self._channel.name}, part {number} of split {self._splits}"
        members = tuple(self.members[rank] for rank in part)
        mine = TorchTransport.__new__(TorchTransport)
        mine._place(self._group, self._links, name, members, part_topology(self.topology, part))
        bond = self._group.bonded()
        mine._links = mine._channel.run("split", lambda: bond.part(name, mine.rank, len(part), self.timeout_s))
        return mine

    def register(self) -> int:
        self._users += 1
        return self._users - 1

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        length = len(values)
        gathered_WN = self._gather(values, self._room, phase)
        if length > self._room:  # on every rank, as they have seen
            self._room = length if length <= MOST_ROOM else self._room
            gathered_WN = self._gather(values, length, phase)
        self._so_far = zlib.crc32(phase.encode(), self._so_far)
        rows: list[list[int]] = gathered_WN[:, TAG_WORDS : TAG_WORDS + length].tolist()
        return rows

    def _gather(self, values: list[int], room: int, phase: str) -> npt.NDArray[np.int64]:
        """Every rank's tag and its first `room` values.

        All-to-all, in which gloo has all messages under way at once: its all-gather passes them around a ring, and took
        twice as long with 4 ranks and with 8.
        """
        turn = self._channel.enter(phase)
        mine_N = np.zeros(TAG_WORDS + room, np.int64)
        mine_N[:2] = len(values), self._so_far
        mine_N[2:TAG_WORDS] = phase_words(phase)
        mine_N[TAG_WORDS : TAG_WORDS + len(values)] = values[:room]
        gathered_WN = np.empty((self.world_size, len(mine_N)), np.int64)
        mine_WN, all_WN = torch.from_numpy(np.tile(mine_N, (self.world_size, 1))), torch.from_numpy(gathered_WN)
        moving = _Moving(self._begin(lambda links: links.control.alltoall_base(all_WN, mine_WN, [], [])))
        self._finish(turn, moving, moving.poll)
        tags: list[list[int]] = gathered_WN[:, :2].tolist()
        if tags.count(tags[0]) < len(tags):
            self._tell_apart(tags, gathered_WN, turn)
        return gathered_WN

    def _tell_apart(self, tags: list[list[int]], gathered_WN: npt.NDArray[np.int64], turn: Turn) -> None:
        """Raises PlanMismatch, and makes it the group's failure; all ranks have the same tags, and find the same."""
        lengths = [length for length, _ in tags]
        found = odd_one(lengths) or odd_one(tags)
        assert found is not None
        (odd, other), who = found, f"rank {self.members[found[0]]}"
        theirs, ours = (phase_text(gathered_WN[rank, 2:TAG_WORDS].tolist()) for rank in found)
        if theirs != ours:
            text = f"{who} is elsewhere: {theirs}"
        elif lengths[odd] != lengths[other]:
            text = f"{who} gathers {lengths[odd]} integers, expected {lengths[other]}"
        else:
            than = f"than rank {self.members[other]}"
            text = f"{who} has come here by other exchanges or transports, or in another order, {than}"
        watch = self._channel.watch
        failure = Failure("mismatch", (self.members[odd],), text, self.members[other])
        raise watch.fail(failure).error(watch.rank, turn.phase)

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        bytes_SB = bytes_of(rows_SD)
        arrived_RB = bytes_SB.new_empty(sum(recv_counts), bytes_SB.shape[1])  # without room for it, not in this turn
        turn = self._channel.enter(phase)
        self._so_far = zlib.crc32(phase.encode(), self._so_far)
        moving: _Moving | GlooRows
        if arrived_RB.is_cuda or self.topology.num_nodes == 1:
            collective = moving = _Moving(
                self._begin(lambda links: links.rows.alltoall_base(arrived_RB, bytes_SB, recv_counts, send_counts))
            )
            poll = collective.left_to_the_stream if arrived_RB.is_cuda else collective.poll
        else:
            pieces = torch.split(bytes_SB, send_counts), torch.split(arrived_RB, recv_counts)
            tag = zlib.crc32(f"{self._channel.name} {turn.number}".encode()) >> 1  # transports may share connections
            moving = self._begin(lambda links: GlooRows(links.rows, self.rank, *pieces, tag))
            poll = moving.poll

        def finish() -> Tensor:
            self._finish(turn, moving, poll)
            assert bytes_SB is not None  # kept alive until everything has left
            return arrived_RB.view(rows_SD.dtype)

        return Then(finish, moving.on_arrival)

    def _finish(self, turn: Turn, moving: "_Moving | GlooRows", poll: Callable[[float], bool]) -> None:
        try:
            self._channel.wait(turn, poll)
        except BaseException:
            if isinstance(moving, _Moving):
                moving.work = None  # which holds connections open, and an error may be kept for long
            raise

    def _begin(self, begin: Callable[[Links], Any]) -> Any:
        """What begin(links) gives; meanwhile nothing lets go of them."""
        with self._links.in_use:
            if self._links.process_group is not None:
                return begin(self._links)
        self._channel.enter("start of a collective")  # raises where it is for a failure that they were let go of
        raise ConfigError(f"rank {self.members[self.rank]}: the group of this transport is closed")


class _Moving:
    """A collective under way."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def poll(self, seconds: float) -> bool:
        """Waits a slice of time, and says whether it is done; raises what broke it."""
        try:
            self.work.wait(SLICE)
        except RuntimeError:
            if not self.work.is_completed():
                return False
            self.work.wait()  # done in between, or else this raises again
        return True

    def on_arrival(self, call: Callable[[], None]) -> None:
        """As of `Then`; what breaks has not arrived."""

        def arrived(future: Any) -> None:
            future.value()  # raises what broke it
            call()

        if self.work is not None:
            self.work.get_future().then(arrived)

    def left_to_the_stream(self, seconds: float) -> bool:
        """Does not wait: the GPU's stream will."""
        return bool(self.work.wait())
