"""The models whose shapes are audited, tuned and benchmarked, and the grouped products their expert layers need.

Sizes are those of the checkpoints' config.json. Legend: N output columns, K inner size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossdock.gemm.configs import Kind, Problem

SPREAD = 8  # ranks that share a model's experts in a usual deployment: one node
ROWS_PER_GROUP = (1, 8, 64, 65, 1024)  # either side of where the formula changes, and well inside


@dataclass(frozen=True)
class Model:
    """An expert layer: hidden size, an expert's inner size, routed experts, experts per token."""

    hidden: int
    expert: int
    experts: int
    top_k: int

    def shape(self, product: str, kind: "Kind") -> tuple[int, int]:
        """(columns, inner) of "gate_up" or "down"; a fused product counts gate columns only."""
        if product == "down":
            return self.hidden, self.expert
        return self.expert * (1 if kind.endswith("_swiglu") else 2), self.hidden


MODELS = {
    "deepseek-v3": Model(7168, 2048, 256, 8),
    "kimi-k2": Model(7168, 2048, 384, 8),
    "qwen3-235b": Model(4096, 1536, 128, 8),
    "qwen3-30b": Model(2048, 768, 128, 8),
}


def products(kind: "Kind") -> tuple[str, ...]:
    """Which of a layer's two products a kind can be: only the first ends in SwiGLU."""
    return ("gate_up",) if kind.endswith("_swiglu") else ("gate_up", "down")


def production(kind: "Kind") -> Iterator["Problem"]:
    """Every product of `kind` in these models, all experts on one rank and spread, from one row a group to many."""
    from crossdock.gemm.configs import Problem

    for model in MODELS.values():
        for product in products(kind):
            for groups in (model.experts, model.experts // SPREAD):
                for rows in ROWS_PER_GROUP:
                    yield Problem(kind, rows * groups, groups, *model.shape(product, kind))
