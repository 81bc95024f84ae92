"""The first meeting of ranks that a launcher started: each leaves its card at the store and reads the others'.

Ranks that were started as parts of different worlds meet at the same port, too. The cards tell: a rank of another world
size, a number given twice, another topology are named on every rank that is there; and so are those who never came.
Whoever finds such a thing leaves word at the store, so that all say the same.
"""

import json
import time
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import Store

from crossdock.errors import CommTimeout, ConfigError, CrossdockError
from crossdock.parallel.standing import name_ranks
from crossdock.parallel.topology import Topology
from crossdock.parallel.wires import Card

LOOK_S = 0.01  # between looks for more cards
STAY_S = 1.0  # how long the rank that holds the store stays after a failure, so that the others read of it


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


def meet(store: Store, mine: Arrival, deadline: float, timeout_s: float) -> list[Arrival]:
    """Every rank's arrival, by rank. A collective of the ranks that were told of this store.

    The first of them whose `deadline` (monotonic; `timeout_s` after it began) has passed ends it for all.

    Raises ConfigError where ranks disagree about the world and CommTimeout where some do not come, naming them. Calls
    into the store of a process that is stopped have no end: bound the whole.
    """
    number = store.add("arrivals", 1)
    store.set(f"arrival/{number}", mine.told())
    met: dict[int, Arrival] = {}
    read = 0
    while len(met) < mine.world_size:
        if store.add("arrivals", 0) > read:
            read += 1
            other = Arrival.heard(store.get(f"arrival/{read}"))
            _tell(store, ConfigError, disagreement(mine, other) or _twice(met, other))
            met[other.card.rank] = other
        elif time.monotonic() > deadline:
            missing = set(range(mine.world_size)) - met.keys()
            _tell(store, CommTimeout, f"{name_ranks(missing)} did not arrive within {timeout_s:g} s")
        else:
            time.sleep(LOOK_S)
        if store.check(["failed"]):
            raise _told(store, mine.card.rank)
    return [met[rank] for rank in range(mine.world_size)]


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


def _tell(store: Store, kind: type[CrossdockError], problem: str) -> None:
    if problem:
        store.set("failed", json.dumps([kind.__name__, problem]))


def _told(store: Store, rank: int) -> CrossdockError:
    kind, problem = json.loads(store.get("failed"))
    if rank == 0:
        time.sleep(STAY_S)
    return (ConfigError if kind == "ConfigError" else CommTimeout)(f"rank {rank}: {problem}")
