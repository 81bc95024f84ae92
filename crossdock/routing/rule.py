"""`Rule`, by which experts are selected, and `Routing`, the outcome.

Legend: T tokens on this rank, E logical experts, K experts per token, P physical slots.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from crossdock.errors import ConfigError

Score = Literal["sigmoid", "softmax", "sqrtsoftplus"]
SCORES: tuple[Score, ...] = ("sigmoid", "softmax", "sqrtsoftplus")
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class Routing:
    """Who serves each token: row t's K choices by falling selection score, ties by the lowest id.

    expert_ids_TK: int64 logical ids, -1: no expert (only in a row's tail).
    weights_TK: float32, 0 where the id is -1; carries the gradient.
    slot_ids_TK: int64 physical slots, -1 where the id is -1; None where no placement tables were given.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    slot_ids_TK: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """The options of `select_experts` that are not tensors, validated against the number of experts.

    Raises ConfigError where they can not describe a router.
    """

    num_experts: int
    top_k: int
    score: Score
    num_groups: int
    top_groups: int
    renormalize: bool
    scale: float

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ConfigError(f"num_experts: found {self.num_experts}, expected 1 to {MAX_EXPERTS}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k: found {self.top_k}, expected 1 to the {self.num_experts} experts")
        if self.score not in SCORES:
            raise ConfigError(f"score: found {self.score!r}, expected one of {', '.join(SCORES)}")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ConfigError(f"num_groups: found {self.num_groups}, expected a divisor of {self.num_experts} experts")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ConfigError(f"top_groups: found {self.top_groups}, expected 1 to the {self.num_groups} groups")

    @property
    def limits_groups(self) -> bool:
        return self.top_groups < self.num_groups


rule_of = lru_cache(maxsize=256)(Rule)  # a layer's rule is the same in every call
