"""`recover`: after a failure, the ranks that are left agree on who they are and go on as a smaller group.

    try:
        y_TD = layer(x_TD)
    except RankFailure:
        group = recover(group)                                   # every survivor calls it
        transport = make_transport(group)
        ...                                                      # experts: see crossdock.moe.survive

They agree by telling one another whom they see, over the wires. A rank takes out of its view who is gone, who does not
answer, and whoever another rank of its view has taken out; views only shrink, and when all in a view have told the same
one, it holds. A rank that comes back, say from being stopped, finds itself left out. Then the lowest of them opens a
store, since the first one may have died with rank 0, and a process group is made through it. Where that fails, because
one more is lost, they agree again. A rank goes on when all those left have said that their group is made: one that dies
after that is found by the first exchange.
"""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from crossdock.errors import CommTimeout, ConfigError, RankFailure
from crossdock.parallel.bond import Bond, connect, release
from crossdock.parallel.bounded import Background
from crossdock.parallel.group import EPGroup, check_timeout
from crossdock.parallel.standing import ANSWER_S, name_ranks
from crossdock.parallel.topology import Topology
from crossdock.parallel.watch import Watch

PHASE = "recovery"


def recover(group: EPGroup, timeout_s: float | None = None) -> EPGroup:
    """The group of the ranks that still answer; a collective of them. `group` is of no further use.

    Ranks are numbered anew in their old order; `members` says what they were. Survivors have `timeout_s` (the group's)
    to come; who answers but does not come by then is left out. Where a network falls apart so that no connection is
    left between two sides, or where most come late, each side goes on: keeping one is the caller's part. Raises
    RankFailure on a rank that the others went on without, CommTimeout where they cannot agree in that time, and
    ConfigError for a group of one, and for a `timeout_s` that `init` would refuse. What is left of a group that
    mpiexec started goes on over torch.distributed.
    """
    wait_s = group.timeout_s if timeout_s is None else timeout_s
    check_timeout(wait_s)
    watch = _take_watch(group)
    try:
        return _go_on(group, watch, wait_s)
    except BaseException:
        watch.close()
        raise


def lost_ranks(before: EPGroup, after: EPGroup) -> tuple[int, ...]:
    """The ranks of `before` that are not in `after`, by their numbers in `before`."""
    return tuple(rank for rank, member in enumerate(before.members) if member not in after.members)


def _go_on(group: EPGroup, watch: Watch, timeout_s: float) -> EPGroup:
    members, store, process_group = _Recovery(watch, group.device, group.timeout_s, timeout_s).run()
    node = dict(zip(group.members, group.topology.node_of_rank, strict=True))
    topology = Topology.from_names(tuple(node[rank] for rank in members))
    rank = members.index(watch.rank)
    if process_group is None or store is None:
        watch.close()
        return EPGroup(0, 1, group.device, None, topology, group.timeout_s, None, members)
    survivors = Watch(watch.wires, members, watch.epoch + 1)
    bond = Bond(survivors, store, process_group, group.device)
    return EPGroup.bound(rank, len(members), group.device, topology, group.timeout_s, bond, members)


def _take_watch(group: EPGroup) -> Watch:
    """The watch of `group`, which has none afterwards: what closes it must not close the wires that survivors keep.

    It has failed by then, on all ranks, and the process group has been let go of.
    """
    watch = group.watch
    if watch is None:
        raise ConfigError(f"rank {group.rank}: a group of one rank, or one that is closed, has nothing to go on with")
    watch.abort("it called recover")  # unless it has failed before
    release(group.let_go())
    object.__setattr__(group, "communicator", None)
    object.__setattr__(group, "bond", None)
    return watch


class _Recovery:
    """One rank's part in it. `view` holds whom this rank sees."""

    def __init__(self, watch: Watch, device: torch.device, wait_s: float, timeout_s: float) -> None:
        self.watch, self.device, self.wait_s, self.timeout_s = watch, device, wait_s, timeout_s
        self.changed = watch.wires.changed
        self.deadline = time.monotonic() + timeout_s
        self.view = set(watch.members)

    def run(self) -> tuple[tuple[int, ...], Store | None, dist.ProcessGroup | None]:
        """(the survivors, the store they met at, their process group); the latter two None for a single one."""
        while True:
            self._agree()
            members = tuple(sorted(self.view))
            if len(members) == 1:
                self.watch.tell("made", ranks=members)
                return members, None, None
            made = self._make(members)
            if made is not None and self._all_made(members):
                for rank in set(self.watch.members) - self.view - self.watch.wires.lost.keys():
                    self.watch.wires.cut(rank, "the others went on without it")
                return members, *made

    def _agree(self) -> None:
        """Until all in the view tell the same one."""
        told: set[int] = set()
        ask_at = time.monotonic() + ANSWER_S / 4
        while True:
            with self.changed:
                self._shrink()
                if self.view != told:
                    told = set(self.view)
                    self.watch.tell("view", ranks=sorted(told))
                if all(self._told("view", rank) == told for rank in told - {self.watch.rank}):
                    return
                self.changed.wait(0.1)
            if time.monotonic() >= ask_at:
                self._drop_silent()
                ask_at = time.monotonic() + ANSWER_S / 4

    def _shrink(self) -> None:
        """Takes out who is lost, whom others have taken out and, when time is up, who has not come."""
        self.view -= self.watch.wires.lost.keys()
        self._weigh_views_without_me()
        late = time.monotonic() - self.deadline
        for rank in sorted(self.view - {self.watch.rank}):
            theirs = self._told("view", rank)
            if theirs is None and late > 0:
                self.view.discard(rank)
            elif theirs is not None:
                self.view &= theirs
        if late > 2 * ANSWER_S:
            raise CommTimeout(f"rank {self.watch.rank}: {PHASE}: no agreement with {name_ranks(self.view)} on who is "
                              f"left within {self.timeout_s:g} s")  # fmt: skip

    def _weigh_views_without_me(self) -> None:
        """Takes out who has taken this rank out, unless that side is the one to go on. Who is out already is not heard,
        unless it has gone on: a rank that comes when all is over has been cut off.

        What this rank has on its side are those who have not said otherwise. It may itself be what was lost, say as it
        was stopped; and a rank that saw nobody for a while must not end the recovery of all the others.
        """
        views = {rank: theirs for rank in self.view if (theirs := self._told("view", rank)) is not None}
        without_me = {rank: theirs for rank, theirs in views.items() if self.watch.rank not in theirs}
        mine = self.view - without_me.keys()
        made = [set(note["ranks"]) for note in self.watch.notes.get("made", {}).values()]
        sides = [*without_me.values(), *(theirs for theirs in made if self.watch.rank not in theirs)]
        if any(self._weight(theirs) > self._weight(mine) for theirs in sides):
            raise RankFailure(f"rank {self.watch.rank}: {PHASE}: the others went on without this rank")
        self.view = mine

    def _weight(self, side: set[int]) -> tuple[int, int, int]:
        """The heavier side goes on: the larger one, that with fewer of those to blame, that with the lowest rank."""
        blamed = self.watch.failure.ranks if self.watch.failure is not None else ()
        return len(side), -len(side.intersection(blamed)), -min(side)

    def _drop_silent(self) -> None:
        standings = self.watch.ask()
        self.view -= {rank for rank, standing in standings.items() if standing is None}

    def _make(self, members: tuple[int, ...]) -> tuple[Store, dist.ProcessGroup] | None:
        """A store and a process group among `members`; None where one more of them is lost meanwhile."""
        rank, epoch = members.index(self.watch.rank), self.watch.epoch + 1

        def work() -> tuple[Store, dist.ProcessGroup]:
            store = self._store(members)
            name = f"crossdock/recovered/{epoch}/{members}"
            return store, connect(store, name, rank, len(members), self.device, self.wait_s)

        making = Background(work, PHASE)
        asked = time.monotonic()
        while not making.done(0.05):
            if not self._still(members):
                return None
            if time.monotonic() - asked > 2 * ANSWER_S:
                self._drop_silent()
                asked = time.monotonic()
        if making.error is None:
            self.watch.tell("made", ranks=members)
            return making.result()
        with self.changed:  # a connection broke: whose, is about to be known
            self.changed.wait_for(lambda: not self._still(members), ANSWER_S)
        self._drop_silent()
        if self._still(members):
            raise RankFailure(f"rank {self.watch.rank}: {PHASE}: {making.error}") from making.error
        return None

    def _store(self, members: tuple[int, ...]) -> Store:
        """The store that the lowest of `members` opens; waits until it says where."""
        host = members[0]
        if self.watch.rank == host:
            store: Store = self._open("0.0.0.0", 0, True)
            self.watch.tell("store", ranks=members, port=store.port)  # type: ignore[attr-defined]
            return store
        with self.changed:
            if not self.changed.wait_for(lambda: self._told("store", host) == set(members), self.timeout_s):
                raise RuntimeError(f"rank {host} has opened no store")
            port = self.watch.notes["store"][host]["port"]
        wires = self.watch.wires
        return self._open(wires.address(next(card for card in wires.cards if card.rank == host)), port, False)

    def _open(self, host: str, port: int, is_master: bool) -> Store:
        wait = timedelta(seconds=self.wait_s)
        return dist.TCPStore(host, port, None, is_master, wait, wait_for_workers=False)  # type: ignore[attr-defined]

    def _all_made(self, members: tuple[int, ...]) -> bool:
        """Whether all of `members` that are still there have said that their group is made."""
        while True:
            with self.changed:
                waiting = set(members) - {self.watch.rank} - self.watch.wires.lost.keys()
                if all(self._told("made", rank) == set(members) for rank in waiting):
                    return True
                if any(self._told("view", rank) != set(members) for rank in waiting):
                    self._shrink()
                    return False
                self.changed.wait(0.1)
            if time.monotonic() > self.deadline + ANSWER_S:
                self._drop_silent()
                with self.changed:
                    self._shrink()

    def _still(self, members: tuple[int, ...]) -> bool:
        """Whether `members` are still all there, and still say so."""
        with self.changed:
            self._shrink()
            return self.view == set(members)

    def _told(self, kind: str, rank: int) -> set[int] | None:
        note = self.watch.notes.get(kind, {}).get(rank)
        return set(note["ranks"]) if note is not None else None
