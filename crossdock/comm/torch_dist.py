"""The `torch` transport: torch.distributed, gloo between CPUs and NCCL between GPUs.

Legend: S rows sent, R rows received, D row width.

Rows travel as uint8 views, because gloo refuses float8 and because an exchange of bytes changes no bits. When a
collective fails, torch says that a connection broke, not whose: the ranks still alive sign in at the store, and those
who have not after a moment are the ones named.
"""

import time
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from crossdock.comm.transport import Pending, Then, check_parts, part_topology
from crossdock.errors import CommTimeout, ConfigError, CrossdockError, RankFailure
from crossdock.parallel import EPGroup, Topology, bounded

ROLL_CALL_S = 2.0  # how long survivors of a failure wait for one another before they name who is missing


class TorchTransport:
    """Collectives over `group`'s process group. Raises ConfigError for a group of one, which has none."""

    name = "torch"

    def __init__(self, group: EPGroup) -> None:
        if group.process_group is None:
            raise ConfigError("transport 'torch' needs a process group: start with torchrun and call crossdock.init()")
        self._group = group  # asked for its process group at each call: a reference to that would outlive close()
        self._part: weakref.ReferenceType[dist.ProcessGroup] | None = None
        self._place(tuple(range(group.world_size)), group.topology)

    def _place(self, members: tuple[int, ...], topology: Topology) -> None:
        self.members, self.topology = members, topology
        self.rank, self.world_size = members.index(self._group.rank), len(members)
        self.timeout_s = self._group.timeout_s
        self._users = 0

    def _process_group(self) -> dist.ProcessGroup:
        part = self._part() if self._part is not None else self._group.process_group
        if self._group.process_group is None or part is None:
            raise ConfigError(f"rank {self._group.rank}: the group of this transport is closed")
        return part

    def split(self, parts: Sequence[Sequence[int]]) -> "TorchTransport":
        check_parts(parts, self.world_size)
        self._process_group()
        began = time.monotonic()
        mine = None
        for part in parts:  # every rank takes part in making each of them
            members = tuple(self.members[rank] for rank in part)
            try:
                process_group = dist.new_group(list(members))
            except RuntimeError as error:
                raise self._explain(error, "split", began) from error
            if self.rank in part:
                mine = TorchTransport(self._group)
                mine._part = weakref.ref(process_group)
                mine._place(members, part_topology(self.topology, part))
        assert mine is not None
        return mine

    def register(self) -> int:
        self._users += 1
        return self._users - 1

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        group = self._process_group()
        mine = torch.tensor(values, dtype=torch.int64)
        gathered_WN = torch.empty(self.world_size, len(values), dtype=torch.int64)
        began = time.monotonic()
        try:
            dist.all_gather(list(gathered_WN.unbind(0)), mine, group=group)
        except RuntimeError as error:
            raise self._explain(error, phase, began) from error
        rows: list[list[int]] = gathered_WN.tolist()
        return rows

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        group = self._process_group()
        bytes_SB = rows_SD.contiguous().view(torch.uint8)
        arrived_RB = bytes_SB.new_empty(sum(recv_counts), bytes_SB.shape[1])
        began = time.monotonic()
        try:
            work = dist.all_to_all_single(arrived_RB, bytes_SB, recv_counts, send_counts, group=group, async_op=True)
        except RuntimeError as error:
            raise self._explain(error, phase, began) from error

        def finish() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._explain(error, phase, began) from error
            assert bytes_SB is not None  # kept alive until everything has left
            return arrived_RB.view(rows_SD.dtype)

        return Then(finish)

    def _explain(self, error: RuntimeError, phase: str, began: float) -> CrossdockError:
        """What broke, in terms of ranks: the ones that do not sign in after a failure."""
        waited, where = time.monotonic() - began, f"rank {self._group.rank}: {phase}"
        missing = self._missing()
        if missing:
            return RankFailure(f"{where}: no sign of rank {', '.join(map(str, missing))}: it is gone or stuck")
        if waited >= 0.9 * self.timeout_s:
            return CommTimeout(f"{where}: the other ranks did not join within {self.timeout_s:g} s")
        return RankFailure(f"{where}: the exchange broke: {str(error).splitlines()[0]}")

    def _missing(self) -> list[int]:
        """Ranks that do not sign in at the store soon; rank 0 where the store, which lives there, gives no answer."""
        seen = {self._group.rank}
        try:
            bounded(lambda: self._roll_call(seen), 2 * ROLL_CALL_S + 1.0)
        except TimeoutError:
            return [0]
        except (RuntimeError, dist.DistError):  # rank 0 is gone: before the failure, or with its own roll call done
            if 0 not in seen:
                return [0]
        return [rank for rank in self.members if rank not in seen]

    def _roll_call(self, seen: set[int]) -> None:
        """Signs in, and adds to `seen` who else does within ROLL_CALL_S; rank 0 stays until they have seen as much."""
        store = dist.distributed_c10d._get_default_store()
        store.set(f"crossdock/alive/{self._group.rank}", "1")
        self._look(store, "alive", set(self.members), seen)
        store.set(f"crossdock/looked/{self._group.rank}", "1")
        if self._group.rank == 0:
            self._look(store, "looked", set(seen), set())

    def _look(self, store: Store, what: str, expected: set[int], seen: set[int]) -> None:
        deadline = time.monotonic() + ROLL_CALL_S
        while expected - seen and time.monotonic() < deadline:
            for rank in sorted(expected - seen):
                if store.check([f"crossdock/{what}/{rank}"]):
                    seen.add(rank)
            time.sleep(0.02)
