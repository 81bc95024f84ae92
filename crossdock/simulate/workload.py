"""Where the routing of a prediction comes from: a skew, a measured load of each expert, or a trace of choices.

Legend: T tokens a rank, E experts, K experts per token, B ranks in a block.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import ConfigError
from crossdock.simulate.routing import popularity, sample_experts
from crossdock.simulate.shape import LayerShape

BLOCK_TOKENS = 1 << 18  # drawn at a time: enough for numpy to be fast, few enough to stay small


@dataclass(frozen=True)
class Drawn:
    """Tokens that choose by popularity weight_E, within the groups that the layer limits them to."""

    shape: LayerShape
    weight_E: NDArray[np.float64]
    seed: int = 0

    @classmethod
    def skewed(cls, shape: LayerShape, skew: float = 0.0, seed: int = 0) -> "Drawn":
        """Popularity 1 / (place + 1) ** skew; which expert takes which place follows from the seed."""
        place_E = np.random.default_rng(seed).permutation(shape.experts)
        return cls(shape, popularity(shape.experts, skew)[place_E], seed)

    def blocks(self, ranks: int, tokens: int) -> Iterator[NDArray[np.int32]]:
        """Expert ids [B, T, K] of consecutive ranks."""
        shape, rng = self.shape, np.random.default_rng((self.seed, ranks, tokens))
        size = max(1, BLOCK_TOKENS // max(1, tokens))
        for first in range(0, ranks, size):
            block = min(size, ranks - first)
            groups = shape.num_groups, shape.top_groups
            ids = sample_experts(rng, block * tokens, self.weight_E, shape.top_k, *groups)
            yield ids.reshape(block, tokens, shape.top_k)


@dataclass(frozen=True)
class Traced:
    """Tokens that chose; rank after rank takes the next T of them, and from the first again behind the last."""

    ids_TK: NDArray[np.int32]

    def blocks(self, ranks: int, tokens: int) -> Iterator[NDArray[np.int32]]:
        """Expert ids [B, T, K] of consecutive ranks."""
        for rank in range(ranks):
            yield self.ids_TK.take(np.arange(rank * tokens, (rank + 1) * tokens), axis=0, mode="wrap")[None]


Routing = Drawn | Traced


def read_routing(path: Path, shape: LayerShape, seed: int = 0) -> Routing:
    """A .npy or .json file with expert ids [tokens, K], -1 for none, or with one load for each expert.

    Raises ConfigError for a file that cannot be read or holds neither.
    """
    try:
        data: Any = np.load(path, allow_pickle=False) if path.suffix == ".npy" else json.loads(path.read_text())
        found = np.asarray(data)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"routing {path} cannot be read: {str(error).splitlines()[0]}") from None
    if found.ndim == 1 and found.shape == (shape.experts,) and found.dtype.kind in "iuf":
        return Drawn(shape, found.astype(np.float64), seed)
    if found.ndim != 2 or found.dtype.kind not in "iu" or found.shape[1] != shape.top_k or not len(found):
        raise ConfigError(
            f"routing {path} must hold integers [tokens, {shape.top_k}] or {shape.experts} loads, found "
            f"{found.dtype} {list(found.shape)}"
        )
    if int(found.min()) < -1 or int(found.max()) >= shape.experts:
        wrong = int(found.min()) if found.min() < -1 else int(found.max())
        raise ConfigError(f"routing {path} must hold ids in -1..{shape.experts - 1}, found {wrong}")
    return Traced(found.astype(np.int32))


def load_of(blocks: list[NDArray[np.int32]], experts: int) -> NDArray[np.float64]:
    """[E], how often each expert is chosen."""
    counts = sum(np.bincount(ids_BTK[ids_BTK >= 0], minlength=experts) for ids_BTK in blocks)
    return np.asarray(counts, dtype=np.float64)
