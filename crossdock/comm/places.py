"""Where ranks and slots stand on nodes, what a rank's tokens want there, and how many rows that makes for everyone.

All of a plan over nodes that needs no exchange of its own: in numpy, on the host, from slot ids and one gather of
counts. What a rank will bring into a node, for the ranks of its rail, those ranks have told already.

Legend: T tokens here, K experts per token, P slots, L slots a rank, W ranks, N nodes, M ranks on a node, J nodes that a
token can be on, which are N or K + 1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from crossdock.comm.plan import Integers
from crossdock.parallel import Topology


@dataclass(frozen=True)
class Places:
    """Where ranks and slots stand, for the rank `rank`. `ranks_NM` are each node's ranks, ascending."""

    topology: Topology
    rank: int
    slots_per_rank: int

    @cached_property
    def ranks_NM(self) -> Integers:
        return np.array([self.topology.ranks_of_node(node) for node in range(self.topology.num_nodes)])

    @cached_property
    def node(self) -> int:
        return self.topology.node_of_rank[self.rank]

    @cached_property
    def number(self) -> int:
        """This rank's number inside its node, and its rail's."""
        return int(np.flatnonzero(self.ranks_NM[self.node] == self.rank)[0])

    @cached_property
    def rail(self) -> list[int]:
        """Ranks of this rank's rail, ascending."""
        return sorted(self.ranks_NM[:, self.number].tolist())

    @cached_property
    def stop_of_node(self) -> Integers:
        """[N]: which of the rail's ranks stands on each node."""
        return np.searchsorted(self.rail, self.ranks_NM[:, self.number])

    @cached_property
    def node_of_slot(self) -> Integers:
        """[P]"""
        return np.array(self.topology.node_of_rank).repeat(self.slots_per_rank)

    @cached_property
    def slot_in_node(self) -> Integers:
        """[P]: a slot's number among those of its node."""
        number_W = np.empty(self.ranks_NM.size, dtype=np.int64)
        number_W[self.ranks_NM] = np.arange(self.ranks_NM.shape[1])
        return (number_W[:, None] * self.slots_per_rank + np.arange(self.slots_per_rank)).reshape(-1)


@dataclass(frozen=True)
class Choices:
    """This rank's slot ids [T, K], -1 for no expert, as nodes and as slots inside those."""

    slot_ids_TK: Integers
    places: Places

    @cached_property
    def node_TK(self) -> Integers:
        """-1 for no expert."""
        return np.where(self.slot_ids_TK < 0, -1, self.places.node_of_slot[self.slot_ids_TK])

    def on(self, node: int) -> Integers:
        """[T, K]: the slots chosen on that node, numbered inside it, -1 elsewhere."""
        return np.where(self.node_TK == node, self.places.slot_in_node[self.slot_ids_TK], -1)

    @cached_property
    def nodes_TJ(self) -> Integers:
        """This node and those that a token chose, each once, ascending; -1 where there is none, anywhere."""
        own_T1 = np.full((len(self.node_TK), 1), self.places.node)
        return _distinct(np.concatenate([self.node_TK, own_T1], 1), self.places.topology.num_nodes)

    @cached_property
    def stops_TJ(self) -> Integers:
        """The rail's stop for each other node that a token chose, -1 elsewhere."""
        elsewhere_TJ = (self.nodes_TJ >= 0) & (self.nodes_TJ != self.places.node)
        return np.where(elsewhere_TJ, self.places.stop_of_node[self.nodes_TJ], -1)

    def crossing(self, order_S: Integers) -> npt.NDArray[np.int32]:
        """[S, K]: what each row sent over the rail is for; order_S are t * J + j, as a plan for stops_TJ has it."""
        token_S, node_S = order_S // self.nodes_TJ.shape[1], self.nodes_TJ.reshape(-1)[order_S]
        on_node_SK = self.node_TK[token_S] == node_S[:, None]
        return np.where(on_node_SK, self.places.slot_in_node[self.slot_ids_TK[token_S]], -1).astype(np.int32)

    def counts(self) -> list[int]:
        """Rows for each slot [P], tokens for each rank [W], tokens for each other node [N]: what is gathered."""
        slots, per_rank = len(self.places.node_of_slot), self.places.slots_per_rank
        ranks_TK = _distinct(self.slot_ids_TK // per_rank, slots // per_rank)  # -1 // any number is -1
        others_TJ = np.where(self.stops_TJ < 0, -1, self.nodes_TJ)
        sizes = slots, slots // per_rank, self.places.topology.num_nodes
        return [
            count
            for ids, size in zip((self.slot_ids_TK, ranks_TK, others_TJ), sizes, strict=True)
            for count in np.bincount(ids.reshape(-1) + 1, minlength=size + 1)[1:].tolist()
        ]


def _distinct(number_TK: Integers, size: int) -> Integers:
    """The numbers below `size` in each row, each once, ascending; -1, which is none, may stand anywhere between.

    [T, size] or [T, K], whichever is narrower: of many nodes or ranks a token knows few.
    """
    if size <= number_TK.shape[1]:
        has = np.zeros((len(number_TK), size + 1), dtype=np.bool_)
        has[np.arange(len(number_TK))[:, None], number_TK] = True  # -1 is the column behind the last
        return np.where(has[:, :size], np.arange(size), -1)
    sorted_TK = np.sort(number_TK, 1)
    sorted_TK[:, 1:][sorted_TK[:, 1:] == sorted_TK[:, :-1]] = -1
    return sorted_TK


@dataclass(frozen=True)
class Counts:
    """What all ranks gathered: `Choices.counts` of each."""

    slots_WP: Integers
    ranks_WW: Integers
    nodes_WN: Integers

    @classmethod
    def split(cls, gathered: list[list[int]], num_slots: int, parts: int) -> list["Counts"]:
        """Of exchanges that were gathered together."""
        each_part = np.split(np.array(gathered, dtype=np.int64), parts, axis=1)
        return [cls(*np.split(part, (num_slots, num_slots + len(gathered)), axis=1)) for part in each_part]

    def over_rail(self, places: Places) -> list[list[int]]:
        """[stop][stop]: rows from each of the rail's ranks to each."""
        node_of_stop = np.argsort(places.stop_of_node)
        rows: list[list[int]] = self.nodes_WN[places.rail][:, node_of_stop].tolist()
        return rows

    def direct(self, places: Places) -> tuple[list[int], list[int]]:
        """[W]: rows to each rank, and from each, where each goes straight to its slot."""
        rows_WW = self.slots_WP.reshape(len(self.slots_WP), -1, places.slots_per_rank).sum(-1)
        return rows_WW[places.rank].tolist(), rows_WW[:, places.rank].tolist()

    def in_node(self, places: Places, is_far: bool) -> tuple[Integers, Integers]:
        """[M][M * L] rows for slots and [M][M] tokens for ranks that each of this node's ranks brings into it.

        Its own tokens', or those of its rail's other ranks, which it stands for here.
        """
        here_M, nodes = places.ranks_NM[places.node], len(places.ranks_NM)
        from_NM = places.ranks_NM[(np.arange(nodes) != places.node) == is_far]
        slots_WWL = self.slots_WP.reshape(len(self.slots_WP), -1, places.slots_per_rank)
        slots_MML = slots_WWL[from_NM][:, :, here_M].sum(0)
        ranks_MM = self.ranks_WW[from_NM][:, :, here_M].sum(0)
        return slots_MML.reshape(len(here_M), -1), ranks_MM
