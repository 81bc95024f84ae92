"""From logits to a token: greedy, or temperature, top-k and top-p with a seed.

Legend: V vocabulary.

The random number of a token depends on (seed, prompt, position) only, so a sampled text does not change with the number
of ranks, with the other prompts of the batch or with speculation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy (ties to the lowest id); top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be finite and at least 0, found {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, found {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be in (0, 1], found {self.top_p}")


def sample(logits_V: Tensor, sampling: Sampling, prompt: int, position: int) -> int:
    """fp32 logits [V] -> token id, for the token at `position` of prompt number `prompt`."""
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    logits_V = logits_V.double().cpu()
    logits, ids = ((logits_V - logits_V.max()) / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        logits = logits[: sampling.top_k]
    probs = logits.softmax(-1)
    # a token is kept while the mass before it is below top_p, so the most likely one always is
    kept = probs[(probs.cumsum(-1) - probs) < sampling.top_p]
    generator = torch.Generator().manual_seed(_key(sampling.seed, prompt, position))
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def _key(seed: int, prompt: int, position: int) -> int:
    """One 63-bit key from three numbers: multiply and mix, so that neighbours share no stream."""
    key = 0
    for value in (seed, prompt, position):
        key = ((key ^ value) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % (1 << 64)
        key ^= key >> 29
    return key % (1 << 63)
