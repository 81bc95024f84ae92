"""Expert selection one row and one expert at a time in Python numbers; shares no code with crossdock.

Scores are computed in float64 and rounded to float32, biased in float32, and compared as they are.
"""

import math

import numpy as np

NEVER = -math.inf


def row_scores(logits: list[float], score: str) -> list[float]:
    """Scores of one row; a NaN logit has the score NaN."""
    capped = [min(x, 3.4028234663852886e38) if x == x else x for x in logits]
    if score == "softmax":
        alive = [x for x in capped if x == x and x > NEVER]
        if not alive:
            return [math.nan] * len(logits)
        top = max(alive)
        total = sum(math.exp(x - top) for x in alive)
        return [math.nan if x != x else float(np.float32(math.exp(x - top) / total)) for x in capped]
    if score == "sigmoid":
        one = lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0  # noqa: E731
    else:
        one = lambda x: math.sqrt(x if x > 30 else math.log1p(math.exp(x)))  # noqa: E731
    return [math.nan if x != x else float(np.float32(one(x))) for x in capped]


def best_first(candidates: list[tuple[float, int]]) -> list[int]:
    """Indices by falling value, ties by the lowest index."""
    return [index for _, index in sorted(candidates, key=lambda c: (-c[0], c[1]))]


def select_row(
    logits: list[float],
    top_k: int,
    score: str = "sigmoid",
    bias: list[float] | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[list[int], list[float]]:
    """Ids (-1: none) and weights of one row."""
    scores = row_scores(logits, score)
    keys = [float(np.float32(s) + np.float32(b)) for s, b in zip(scores, bias or [0.0] * len(scores), strict=True)]
    keys = [k if k == k else NEVER for k in keys]
    size = len(keys) // num_groups
    groups = []
    for g in range(num_groups):
        pair = sorted(keys[g * size : (g + 1) * size], reverse=True)[:2]
        groups.append((float(np.float32(sum(pair))), g))
    kept = best_first(groups)[:top_groups]
    open_experts = [(k, e) for e, k in enumerate(keys) if e // size in kept and k > NEVER]
    ids = best_first(open_experts)[:top_k]
    picked = [scores[e] for e in ids]
    total = sum(picked) + 1e-20 if renormalize else 1.0
    missing = top_k - len(ids)
    return ids + [-1] * missing, [scale * s / total for s in picked] + [0.0] * missing
