"""The `torch` transport: torch.distributed, gloo between CPUs and NCCL between GPUs.

Legend: S rows sent, R rows received, D row width.

Rows travel as uint8 views, because gloo refuses float8 and because an exchange of bytes changes no bits. The backends
are called directly: torch.distributed's functions check what was checked here already, at 10 us a call. A wait is a
`Channel`'s: it ends when the group fails anywhere, and names the rank to blame.
"""

import hashlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from crossdock.comm.transport import Pending, Then, bytes_of, check_parts, part_topology
from crossdock.errors import ConfigError, PlanMismatch
from crossdock.parallel import EPGroup, Topology
from crossdock.parallel.bond import Links
from crossdock.parallel.standing import Turn
from crossdock.parallel.watch import SLICE_S

SLICE = timedelta(seconds=SLICE_S)


class TorchTransport:
    """Collectives over `group`'s process group. Raises ConfigError for a group of one, which has none."""

    name = "torch"

    def __init__(self, group: EPGroup) -> None:
        if group.process_group is None:
            raise ConfigError("transport 'torch' needs a process group: start with torchrun and call crossdock.init()")
        bond = group.bonded()
        self._place(group, bond.whole, bond.name(), group.members, group.topology)

    def _place(self, group: EPGroup, links: Links, name: str, members: tuple[int, ...], topology: Topology) -> None:
        self._group, self._links = group, links
        self.members, self.topology = members, topology
        self.rank, self.world_size = members.index(group.members[group.rank]), len(members)
        self.timeout_s = group.timeout_s
        self._channel = group.bonded().watch.channel(name, members, group.timeout_s)
        self._users = self._splits = 0

    def abort(self, why: str) -> None:
        self._channel.watch.abort(why)

    def split(self, parts: Sequence[Sequence[int]]) -> "TorchTransport":
        check_parts(parts, self.world_size)
        digest = hashlib.sha256(repr([list(part) for part in parts]).encode()).digest()
        ours = int.from_bytes(digest[:8], "big") >> 1
        for rank, (theirs,) in enumerate(self.all_gather([ours], "split")):
            if theirs != ours:
                me, other = self.members[self.rank], self.members[rank]
                raise PlanMismatch(f"rank {me}: split: rank {other} has other parts, expected {list(parts)} as here")
        self._splits += 1
        number, part = next((n, part) for n, part in enumerate(parts) if self.rank in part)
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
        turn = self._channel.enter(phase)
        mine = torch.tensor(values, dtype=torch.int64)
        gathered_WN = torch.empty(self.world_size, len(values), dtype=torch.int64)
        all_W = [list(gathered_WN.unbind(0))]
        moving = _Moving(self._begin(lambda links: links.control.allgather(all_W, [mine])))
        self._finish(turn, moving, moving.poll)
        rows: list[list[int]] = gathered_WN.tolist()
        return rows

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        turn = self._channel.enter(phase)
        bytes_SB = bytes_of(rows_SD)
        arrived_RB = bytes_SB.new_empty(sum(recv_counts), bytes_SB.shape[1])
        work = self._begin(lambda links: links.rows.alltoall_base(arrived_RB, bytes_SB, recv_counts, send_counts))
        moving = _Moving(work)

        def finish() -> Tensor:
            self._finish(turn, moving, moving.left_to_the_stream if arrived_RB.is_cuda else moving.poll)
            assert bytes_SB is not None  # kept alive until everything has left
            return arrived_RB.view(rows_SD.dtype)

        return Then(finish)

    def _finish(self, turn: Turn, moving: "_Moving", poll: Callable[[float], bool]) -> None:
        try:
            self._channel.wait(turn, poll)
        except BaseException:
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

    def left_to_the_stream(self, seconds: float) -> bool:
        """Does not wait: the GPU's stream will."""
        return bool(self.work.wait())
