"""`Counted`: a transport that counts what it is given to carry to other nodes, and passes everything on.

Legend: T tokens, K experts per token, S rows sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crossdock.comm import Pending, Transport

ROWS = ("dispatch", "combine")  # phases in which rows of tokens move; what else moves says where they go


@dataclass
class Crossed:
    """Bytes from this rank to ranks on other nodes: rows of tokens, and the integers that go with them."""

    rows: int = 0
    metadata: int = 0

    def add(self, phase: str, size: int) -> None:
        if phase.startswith(ROWS):
            self.rows += size
        else:
            self.metadata += size

    def clear(self) -> None:
        self.rows = self.metadata = 0


class Counted:
    """What crosses is `crossed`, which parts that split off add to as well."""

    def __init__(self, inner: Transport, crossed: Crossed | None = None) -> None:
        self.inner, self.crossed = inner, crossed or Crossed()
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size
        self.timeout_s, self.topology, self.members = inner.timeout_s, inner.topology, inner.members
        self._far = [not self.topology.same_node(self.rank, peer) for peer in range(self.world_size)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # whatever one transport has beyond the protocol

    def split(self, parts: Sequence[Sequence[int]]) -> "Counted":
        return Counted(self.inner.split(parts), self.crossed)

    def register(self) -> int:
        return self.inner.register()

    def all_gather(self, values: list[int], phase: str) -> list[list[int]]:
        self.crossed.metadata += 8 * len(values) * sum(self._far)
        return self.inner.all_gather(values, phase)

    def all_to_all_rows(
        self, rows_SD: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> Pending[Tensor]:
        row_bytes = rows_SD.element_size() * rows_SD.shape[1:].numel()
        self.crossed.add(phase, row_bytes * sum(n for n, far in zip(send_counts, self._far, strict=True) if far))
        return self.inner.all_to_all_rows(rows_SD, send_counts, recv_counts, phase)


def crossings(slot_ids_TK: Tensor, transport: Transport, slots_per_rank: int) -> tuple[int, int]:
    """(rows of this rank's that leave its node where each (token, k) is one, and where each (token, node) is)."""
    node_of_rank = transport.topology.node_of_rank
    own = node_of_rank[transport.rank]
    nodes = [[node_of_rank[slot // slots_per_rank] for slot in slots if slot >= 0] for slots in slot_ids_TK.tolist()]
    each = sum(node != own for chosen in nodes for node in chosen)
    return each, sum(node != own for chosen in nodes for node in set(chosen))
