"""Which ranks share a node: what tells a cheap exchange from a dear one."""

from dataclasses import dataclass

from crossdock.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """`node_of_rank[r]` is the node rank r runs on; nodes are numbered from 0 in the order of their first rank.

    >>> Topology.from_names(("a", "a", "b", "b")).node_of_rank
    (0, 0, 1, 1)
    """

    node_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        seen = 0
        for rank, node in enumerate(self.node_of_rank):
            if not 0 <= node <= seen:
                raise ConfigError(
                    f"Topology: rank {rank} is on node {node}, expected at most {seen} (numbered in order)"
                )
            seen = max(seen, node + 1)
        if not self.node_of_rank:
            raise ConfigError("Topology: expected at least one rank, found none")

    @classmethod
    def from_names(cls, names: "tuple[str | int, ...]") -> "Topology":
        """Ranks with the same name (of a host) share a node."""
        number: dict[str | int, int] = {}
        return cls(tuple(number.setdefault(name, len(number)) for name in names))

    @property
    def num_nodes(self) -> int:
        return max(self.node_of_rank) + 1

    def ranks_of_node(self, node: int) -> tuple[int, ...]:
        """The ranks on `node`, ascending."""
        return tuple(rank for rank, n in enumerate(self.node_of_rank) if n == node)

    def same_node(self, a: int, b: int) -> bool:
        return self.node_of_rank[a] == self.node_of_rank[b]
