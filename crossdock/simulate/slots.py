"""`Slots`: which experts stand on which rank, and which replica a token takes; what `parallel` does, for many ranks.

The rules are those of `ExpertPlacement`, in numpy and for blocks of ranks at once. Where there are more ranks than
experts, or they do not divide, experts are repeated in order until every rank has as many slots.

Legend: B ranks in a block, T tokens a rank, K experts per token, E experts, P slots, L slots a rank, X most replicas.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import ConfigError


@dataclass(frozen=True)
class Slots:
    """expert_of_P[p] is the expert in slot p, -1 for none; slots r * L to (r + 1) * L - 1 are rank r's."""

    name: str
    ranks: int
    num_experts: int
    expert_of_P: NDArray[np.int64]

    @property
    def per_rank(self) -> int:
        """L."""
        return len(self.expert_of_P) // self.ranks

    @classmethod
    def contiguous(cls, num_experts: int, ranks: int) -> "Slots":
        """Experts in order, from the first again where slots are left."""
        per_rank = -(-num_experts // ranks)
        return cls("contiguous", ranks, num_experts, np.arange(ranks * per_rank) % num_experts)

    @classmethod
    def balanced(
        cls, load_E: NDArray[np.float64], ranks: int, nodes: int, num_groups: int = 1, spare: int = 0
    ) -> "Slots":
        """What `parallel.rebalance` makes of a load, with `spare` slots a rank more than the experts need."""
        import torch  # rebalance is the only thing here that needs it

        from crossdock.parallel import rebalance

        experts = len(load_E)
        slots = ranks * (-(-experts // ranks) + spare)
        placed_1P = rebalance(torch.from_numpy(load_E)[None], slots, num_groups, nodes, ranks)[0]
        return cls("balanced", ranks, experts, placed_1P[0].numpy())

    @cached_property
    def _replicas(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(slots of each expert in ascending order [E, X], how many [E])."""
        held = [np.flatnonzero(self.expert_of_P == expert) for expert in range(self.num_experts)]
        count_E = np.array([len(slots) for slots in held], dtype=np.int32)
        if not count_E.all():
            raise ConfigError(f"expert {int(count_E.argmin())} has no slot")
        table_EX = np.full((self.num_experts, int(count_E.max())), -1, dtype=np.int32)
        for expert, slots in enumerate(held):
            table_EX[expert, : len(slots)] = slots
        return table_EX, count_E

    def choose(self, ids_BTK: NDArray[np.int32]) -> NDArray[np.int32]:
        """Expert ids to slots; -1 stays -1. Token t of each rank takes replica t % replicas."""
        table_EX, count_E = self._replicas
        known_BTK = np.maximum(ids_BTK, 0)
        if table_EX.shape[1] == 1:
            slots_BTK = table_EX[known_BTK, 0]
        else:
            token_T1 = np.arange(ids_BTK.shape[1], dtype=np.int32)[:, None]
            slots_BTK = table_EX[known_BTK, token_T1 % count_E[known_BTK]]
        return np.where(ids_BTK < 0, np.int32(-1), slots_BTK)
