"""`ExpertPlacement`: which expert stands in which slot of which rank.

Legend: T tokens, K experts per token, E logical experts, P physical slots, W ranks, L slots a rank (P / W), X most
replicas of any expert.

    E = 5 experts, W = 3 ranks, L = 2 slots     rank 0   rank 1   rank 2
    physical_to_logical                         0  1   | 2  3   | 4  0        expert 0 has a replica on rank 2
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from crossdock.errors import ConfigError, RankFailure


@dataclass(frozen=True)
class ExpertPlacement:
    """physical_to_logical[p] is the expert in slot p (-1: none); slots r * L to (r + 1) * L - 1 are rank r's.

    Raises ConfigError where slots do not divide over the ranks, an expert has no slot, or one rank holds two replicas
    of an expert that has no more replicas than there are ranks, unless that is what was `left` after ranks were lost.
    """

    num_experts: int
    world_size: int
    physical_to_logical: tuple[int, ...]
    left: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        slots = len(self.physical_to_logical)
        if self.world_size < 1 or self.num_experts < 1:
            raise ConfigError(f"placement needs experts and ranks, found {self.num_experts} and {self.world_size}")
        if slots == 0 or slots % self.world_size:
            raise ConfigError(f"{slots} slots do not divide over {self.world_size} ranks")
        for slot, expert in enumerate(self.physical_to_logical):
            if not -1 <= expert < self.num_experts:
                raise ConfigError(f"slot {slot} holds expert {expert}, expected -1 to {self.num_experts - 1}")
        for expert, held in enumerate(self._slots_of_expert):
            if not held:
                raise ConfigError(f"expert {expert} has no slot")
            ranks = [slot // self.slots_per_rank for slot in held]
            twice = next((rank for rank in ranks if ranks.count(rank) > 1), None)
            if twice is not None and len(held) <= self.world_size and not self.left:
                raise ConfigError(f"rank {twice} holds expert {expert} twice, but its {len(held)} replicas fit on "
                                  f"{self.world_size} ranks one each")  # fmt: skip

    @classmethod
    def contiguous(cls, num_experts: int, world_size: int) -> "ExpertPlacement":
        """Expert e on rank e // (E / W), no replicas. Raises ConfigError where W does not divide E."""
        if world_size < 1 or num_experts % world_size:
            raise ConfigError(
                f"{num_experts} experts do not divide over {world_size} ranks: use as many ranks as divide them, "
                "or give an ExpertPlacement with -1 in the slots left over"
            )
        return cls(num_experts, world_size, tuple(range(num_experts)))

    def without(self, ranks: Iterable[int]) -> "ExpertPlacement":
        """The placement of the other ranks, numbered anew in their order; each keeps what it has in every slot.

        Raises RankFailure, naming the experts, where one was held by `ranks` alone, and ConfigError for ranks that
        there are not, or all of them.

        >>> ExpertPlacement(3, 3, (0, 1, 1, 2, 2, 0)).without([1]).physical_to_logical
        (0, 1, 2, 0)
        """
        lost = set(ranks)
        stay = [rank for rank in range(self.world_size) if rank not in lost]
        if lost - set(range(self.world_size)) or not stay:
            raise ConfigError(f"some of the ranks 0..{self.world_size - 1} must stay, found {sorted(lost)} taken out")
        held = tuple(expert for rank in stay for expert in self.experts_of_rank(rank))
        missing = sorted(set(range(self.num_experts)) - set(held))
        if missing:
            raise RankFailure(f"experts {missing} are lost: no rank but {sorted(lost)}, which are gone, held them")
        return ExpertPlacement(self.num_experts, len(stay), held, left=True)

    @property
    def checksum(self) -> int:
        """Of what each slot holds, for ranks to compare."""
        return zlib.crc32(repr(self.physical_to_logical).encode())

    @property
    def num_slots(self) -> int:
        """P."""
        return len(self.physical_to_logical)

    @property
    def slots_per_rank(self) -> int:
        """L."""
        return len(self.physical_to_logical) // self.world_size

    def slots_of_rank(self, rank: int) -> range:
        """The physical slots of `rank`."""
        return range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    def experts_of_rank(self, rank: int) -> tuple[int, ...]:
        """The logical expert in each of `rank`'s slots, -1 where a slot is empty."""
        return tuple(self.physical_to_logical[slot] for slot in self.slots_of_rank(rank))

    @cached_property
    def _slots_of_expert(self) -> list[list[int]]:
        held: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.physical_to_logical):
            if expert >= 0:
                held[expert].append(slot)
        return held

    @cached_property
    def is_identity(self) -> bool:
        """Whether slot p holds expert p, so that expert ids are slot ids."""
        return self.physical_to_logical[: self.num_experts] == tuple(range(self.num_experts)) and not any(
            expert >= 0 for expert in self.physical_to_logical[self.num_experts :]
        )

    @cached_property
    def logical_to_physical_EX(self) -> Tensor:
        """int64 [E, X], the slots of each expert in ascending order, -1 padded; on the CPU."""
        most = max(map(len, self._slots_of_expert))
        return torch.tensor([held + [-1] * (most - len(held)) for held in self._slots_of_expert])

    @cached_property
    def replica_count_E(self) -> Tensor:
        """int64 [E], how many slots hold each expert; on the CPU."""
        return torch.tensor([len(held) for held in self._slots_of_expert])

    def slot_ids(self, expert_ids_TK: Tensor) -> Tensor:
        """Logical ids to physical slots, int64 [T, K]; -1 stays -1. Token t takes replica t % replicas."""
        if self.is_identity:
            return expert_ids_TK
        table_EX = self.logical_to_physical_EX.to(expert_ids_TK.device)
        count_E = self.replica_count_E.to(expert_ids_TK.device)
        known_TK = expert_ids_TK.clamp(min=0)
        token_T1 = torch.arange(expert_ids_TK.shape[0], device=expert_ids_TK.device)[:, None]
        slots_TK = table_EX[known_TK, token_T1 % count_E[known_TK]]
        return torch.where(expert_ids_TK < 0, expert_ids_TK, slots_TK)
