"""Which experts tokens choose, drawn by popularity; the one source of routing for predictions and for benchmarks.

A prediction can be held against a measurement only where both count the same rows, so a benchmark draws its routing
here too, from a seed and with numpy alone.

A token's experts are drawn one after another, each by its popularity among those not chosen yet. Rejected: the K
largest of E perturbed scores (Gumbel), which is the same distribution but takes 1e9 logarithms for 1024 ranks of 4096
tokens. Here tokens that drew an expert twice draw again, and only those.

Legend: T tokens, E experts, K experts per token, G groups of experts, C candidates.
"""

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import ConfigError

ROUTINGS = {"random": 0.0, "skewed": 1.0}  # a benchmark's name for each skew
PASSES = 32  # of drawing again; for what is left then, every expert gets a score


def popularity(num_experts: int, skew: float) -> NDArray[np.float64]:
    """[E], 1 / (e + 1) ** skew: all alike for 0, Zipf's law for 1; expert 0 is the most popular."""
    if num_experts < 1 or not 0.0 <= skew <= 10.0:  # false for NaN too
        raise ConfigError(f"skew must be in 0..10 and experts at least 1, found {skew} and {num_experts}")
    return np.arange(1, num_experts + 1, dtype=np.float64) ** -skew


def rank_choices(routing: str, rank: int, tokens: int, num_experts: int, top_k: int) -> NDArray[np.int64]:
    """Expert ids [T, K] of one rank of a benchmark, for a routing of ROUTINGS; a function of the arguments alone."""
    if routing not in ROUTINGS:
        raise ConfigError(f"routing must be one of {', '.join(ROUTINGS)}, found {routing!r}")
    rng = np.random.default_rng(rank)
    return sample_experts(rng, tokens, popularity(num_experts, ROUTINGS[routing]), top_k).astype(np.int64)


def sample_experts(
    rng: np.random.Generator,
    tokens: int,
    weight_E: NDArray[np.float64],
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
) -> NDArray[np.int32]:
    """K distinct experts for each token, [T, K] in the order drawn, with probabilities in proportion to weight_E.

    With groups a token first draws `top_groups` distinct groups, by the sum of their experts' weights, then experts of
    those. Raises ConfigError for weights or groups that leave fewer than K experts to choose from.
    """
    _check(weight_E, top_k, num_groups, top_groups)
    if top_groups == num_groups:
        return _distinct(rng, tokens, weight_E, top_k, None)
    groups_TG = np.zeros((tokens, num_groups), dtype=bool)
    weight_G = weight_E.reshape(num_groups, -1).sum(1)
    np.put_along_axis(groups_TG, _distinct(rng, tokens, weight_G, top_groups, None), True, axis=1)
    return _distinct(rng, tokens, weight_E, top_k, groups_TG)


def _check(weight_E: NDArray[np.float64], top_k: int, num_groups: int, top_groups: int) -> None:
    experts = len(weight_E)
    if not np.isfinite(weight_E).all() or (weight_E < 0).any():
        raise ConfigError("expert loads must be finite and at least 0")
    if not 1 <= top_groups <= num_groups or experts % num_groups:
        raise ConfigError(f"{experts} experts cannot be {num_groups} groups of which a token takes {top_groups}")
    loaded_G = np.sort((weight_E.reshape(num_groups, -1) > 0).sum(1))
    loaded_G = loaded_G[loaded_G > 0]
    fewest = int(loaded_G[:top_groups].sum()) if len(loaded_G) >= top_groups else 0
    if not 1 <= top_k <= fewest:
        raise ConfigError(f"a token needs {top_k} experts, but may have only {fewest} with any load to choose from")


def _distinct(
    rng: np.random.Generator,
    tokens: int,
    weight_E: NDArray[np.float64],
    count: int,
    groups_TG: NDArray[np.bool_] | None,
) -> NDArray[np.int32]:
    """`count` distinct ids for each token, of its groups where some are given."""
    size = 1 if groups_TG is None else len(weight_E) // groups_TG.shape[1]
    draw = _Draw(rng, weight_E)
    chosen_KT = np.empty((count, tokens), dtype=np.int32)
    for k in range(count):
        left = np.arange(tokens)
        for _ in range(PASSES):
            candidate_C = draw(len(left))
            fits_C = (chosen_KT[:k, left] != candidate_C).all(0)
            if groups_TG is not None:
                fits_C &= groups_TG[left, candidate_C // size]
            chosen_KT[k, left[fits_C]] = candidate_C[fits_C]
            left = left[~fits_C]
            if not len(left):
                break
        else:
            allowed_CE = np.ones((len(left), len(weight_E)), dtype=bool)
            if groups_TG is not None:
                allowed_CE = np.repeat(groups_TG[left], size, axis=1)
            np.put_along_axis(allowed_CE, chosen_KT[:k, left].T, False, axis=1)
            chosen_KT[k, left] = _by_score(rng, weight_E, allowed_CE)
    return np.ascontiguousarray(chosen_KT.T)


def _by_score(
    rng: np.random.Generator, weight_E: NDArray[np.float64], allowed_CE: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """One id for each row, of those allowed: the first of clocks that ring at the rates weight_E."""
    rings_CE = np.full(allowed_CE.shape, np.inf)
    np.divide(rng.standard_exponential(allowed_CE.shape), weight_E, out=rings_CE, where=allowed_CE & (weight_E > 0))
    first_C: NDArray[np.int64] = rings_CE.argmin(1)
    return first_C


class _Draw:
    """Independent ids in proportion to weight_E, in constant time each: Walker's alias method (Vose, 1991)."""

    def __init__(self, rng: np.random.Generator, weight_E: NDArray[np.float64]) -> None:
        self.rng, experts = rng, len(weight_E)
        self.keep_E = weight_E * (experts / weight_E.sum())
        self.alias_E = np.arange(experts, dtype=np.int32)
        small = [e for e in range(experts) if self.keep_E[e] < 1.0]
        large = [e for e in range(experts) if self.keep_E[e] >= 1.0]
        while small and large:
            giver = large[-1]
            taker = small.pop()
            self.alias_E[taker] = giver
            self.keep_E[giver] -= 1.0 - self.keep_E[taker]
            if self.keep_E[giver] < 1.0:
                small.append(large.pop())
        self.keep_E[small + large] = 1.0  # what rounding left over

    def __call__(self, count: int) -> NDArray[np.int32]:
        id_C = self.rng.integers(len(self.alias_E), size=count, dtype=np.int32)
        own_C = self.rng.random(count, dtype=np.float32) < self.keep_E[id_C]
        return np.where(own_C, id_C, self.alias_E[id_C])
