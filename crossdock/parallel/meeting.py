"""The first meeting of ranks at a store: each leaves its card there, and rank 0 says who is in.

    rank 0    writes a random name of this start, reads the arrivals below it, and writes a verdict: who was there, or
              what is wrong
    rank r    leaves its arrival below that name, and again whenever the name changes, and is in once its own secret
              stands in the verdict

A store may outlive the ranks that met there: a launcher's does, and so does an engine's. What they left stands below a
name of theirs, and no verdict among it knows the secret of a rank that has come since. Rejected: numbers of starts, as
TORCHELASTIC_RESTART_COUNT is one. Each agent of torchrun counts its own, and after a change of members they differ.

Ranks that were started as parts of different worlds meet at the same port, too. The cards tell: a rank of another world
size, a number given twice, another topology are named on every rank that is there; and so are those who never came.
"""

import contextlib
import json
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field

from torch.distributed.distributed_c10d import PrefixStore, Store

from crossdock.errors import CommTimeout, ConfigError
from crossdock.parallel.standing import name_ranks
from crossdock.parallel.topology import Topology

START, VERDICT, GAVE_UP, ARRIVALS = "start", "verdict", "gave up", "arrivals"  # keys
LOOK_S = 0.01  # between looks for more cards
LOOK_AGAIN_S = 0.1  # where there is a verdict, which is another start's
STAY_S = 1.0  # how long rank 0, whose process may hold the store, stays after a failure, so that others read of it


@dataclass(frozen=True)
class Card:
    """How rank `rank` is reached by the others. `host` is the name of its machine."""

    rank: int
    host: str
    address: str
    port: int
    secret: str


class Listener:
    """A port of this rank's, open before the others know of it."""

    def __init__(self, rank: int, toward: str) -> None:
        """`toward` is a host that every rank reaches: the address this machine has on the way there is the one told."""
        address, family = _own_address(toward)
        self.socket = _open_port(family)
        self.card = Card(rank, socket.gethostname(), address, self.socket.getsockname()[1], secrets.token_hex(8))


def _own_address(toward: str) -> tuple[str, socket.AddressFamily]:
    """The address this machine is seen with from `toward`; no packet is sent to find it."""
    try:
        family, _, _, _, target = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]), socket.AddressFamily(family)
    except OSError:
        return "127.0.0.1", socket.AF_INET


def _open_port(family: socket.AddressFamily) -> socket.socket:
    """A port on every address of this machine, of both families where the system can: ranks may see different ones."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), family=family, backlog=1024)


@dataclass(frozen=True)
class Arrival:
    """A card, and what its rank was told of the world; `nodes` is the topology it was given, empty where none was."""

    card: Card
    world_size: int
    nodes: tuple[int, ...]

    def told(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def heard(cls, told: str | bytes) -> "Arrival":
        parts = json.loads(told)
        return cls(Card(**parts["card"]), parts["world_size"], tuple(parts["nodes"]))


@dataclass(frozen=True)
class Verdict:
    """Who was there, and what is wrong: the name of an error's class and its text, empty where nothing is."""

    arrivals: tuple[Arrival, ...]
    kind: str = ""
    text: str = ""

    def told(self) -> str:
        return json.dumps([[one.told() for one in self.arrivals], self.kind, self.text])

    @classmethod
    def heard(cls, told: str | bytes) -> "Verdict":
        arrivals, kind, text = json.loads(told)
        return cls(tuple(map(Arrival.heard, arrivals)), kind, text)


@dataclass
class _Arrivals:
    """Those below one name, read as they come."""

    store: Store
    seen: list[Arrival] = field(default_factory=list)
    _unread: set[int] = field(default_factory=set)
    _count: int = 0

    def add(self, mine: Arrival) -> None:
        self.store.set(f"arrival/{self.store.add(ARRIVALS, 1)}", mine.told())

    def read(self) -> list[Arrival]:
        """The new ones. A rank may end between its number and its card: such a number is passed over."""
        count = self.store.add(ARRIVALS, 0)
        self._unread.update(range(self._count + 1, count + 1))
        self._count = count
        there = [number for number in sorted(self._unread) if self.store.check([f"arrival/{number}"])]
        self._unread.difference_update(there)
        new = [Arrival.heard(self.store.get(f"arrival/{number}")) for number in there]
        self.seen += new
        return new


def meet(store: Store, mine: Arrival, deadline: float, timeout_s: float) -> tuple[PrefixStore, list[Arrival]]:
    """Every rank's arrival, by rank, and a part of the store that is this start's alone.

    A collective of the ranks that were told of this store. The first of them whose `deadline` (monotonic; `timeout_s`
    after it began) has passed ends it for all.

    Raises ConfigError where ranks disagree about the world and CommTimeout where some do not come, naming them. Calls
    into the store of a process that is stopped have no end: bound the whole.
    """
    inside, verdict = (_follow if mine.card.rank else _judge)(store, mine, deadline, timeout_s)
    if verdict.kind:
        kind = ConfigError if verdict.kind == "ConfigError" else CommTimeout
        raise kind(f"rank {mine.card.rank}: {verdict.text}")
    return inside, sorted(verdict.arrivals, key=lambda one: one.card.rank)


def _judge(store: Store, mine: Arrival, deadline: float, timeout_s: float) -> tuple[PrefixStore, Verdict]:
    """Rank 0's part."""
    name = secrets.token_hex(8)
    inside = PrefixStore(name, store)
    arrivals, met = _Arrivals(inside), {mine.card.rank: mine}
    store.set(START, name)
    wrong: tuple[str, str] | None = None
    while wrong is None and len(met) < mine.world_size:
        new = arrivals.read()
        for other in new:
            problem = disagreement(mine, other) or _twice(met, other)
            wrong = wrong or (("ConfigError", problem) if problem else None)
            met[other.card.rank] = other
        if new:
            continue
        if store.get(START).decode() != name:
            wrong = "ConfigError", "two processes were started as rank 0"
        elif inside.check([GAVE_UP]):
            wrong = "CommTimeout", inside.get(GAVE_UP).decode()
        elif time.monotonic() > deadline:
            wrong = "CommTimeout", _missing(set(range(mine.world_size)) - met.keys(), timeout_s)
        else:
            time.sleep(LOOK_S)
    if wrong is None and inside.check([GAVE_UP]):  # before the last of them came
        wrong = "CommTimeout", inside.get(GAVE_UP).decode()
    leave_at = time.monotonic() + STAY_S
    while True:  # after a failure whoever comes hears of it, too
        verdict = Verdict((mine, *arrivals.seen), *(wrong or ()))
        inside.set(VERDICT, verdict.told())
        while wrong is not None and time.monotonic() < leave_at and not arrivals.read():
            time.sleep(LOOK_S)
        if wrong is None or time.monotonic() >= leave_at:
            return inside, verdict


def _follow(store: Store, mine: Arrival, deadline: float, timeout_s: float) -> tuple[PrefixStore, Verdict]:
    """Any other rank's part. A name may be an earlier start's: then it changes once rank 0 has come."""
    name, inside, verdict = "", PrefixStore("", store), None
    is_over = False
    while not is_over:
        is_over = time.monotonic() > deadline  # and one look more
        if store.check([START]) and (now := store.get(START).decode()) != name:
            name, inside, verdict = now, PrefixStore(now, store), None
            _Arrivals(inside).add(mine)
        if name and inside.check([VERDICT]):
            verdict = Verdict.heard(inside.get(VERDICT))
            if any(one.card.secret == mine.card.secret for one in verdict.arrivals):
                return inside, verdict
        time.sleep(LOOK_S if verdict is None else LOOK_AGAIN_S)
    if not name:
        return inside, Verdict((), "CommTimeout", _missing({0}, timeout_s))
    came = {one.card.rank for one in _Arrivals(inside).read()}
    missing = set(range(1, mine.world_size)) - came
    text = _missing(missing, timeout_s)
    if verdict is not None or not missing:
        text = f"rank 0 did not let all ranks in within {timeout_s:g} s"
    inside.set(GAVE_UP, text)
    return inside, Verdict((), "CommTimeout", text)


def topology_of(met: list[Arrival]) -> Topology:
    """The one that was given, or ranks with the same host name on one node."""
    return Topology(met[0].nodes) if met[0].nodes else Topology.from_names(tuple(one.card.host for one in met))


def disagreement(mine: Arrival, other: Arrival) -> str:
    """Why the two were not started as ranks of one world; empty where they were."""
    names = f"rank {other.card.rank}", f"rank {mine.card.rank}"
    if other.world_size != mine.world_size:
        return f"{names[0]} was started with WORLD_SIZE {other.world_size}, {names[1]} with {mine.world_size}"
    if other.nodes != mine.nodes:
        return f"{names[0]} was given nodes {list(other.nodes)}, {names[1]} {list(mine.nodes)}"
    return ""


def _twice(met: dict[int, Arrival], other: Arrival) -> str:
    return f"two processes were started as rank {other.card.rank}" if other.card.rank in met else ""


def _missing(ranks: set[int], timeout_s: float) -> str:
    return f"{name_ranks(ranks)} did not arrive within {timeout_s:g} s"
