"""What tests of MLA's kernels share: numbers whose sizes differ, rotary tables, and a step of decoding sequences."""

import math

import torch
from torch import Tensor

from crossdock.models.cache import Decoding, PagedCache, Sequence
from crossdock.models.deepseek.absorbed_kernel import absorb_queries_triton
from crossdock.models.deepseek.latent_attention_kernel import attend_latents_triton
from crossdock.models.deepseek.values_kernel import expand_values_triton

SCALE = 0.01


def decades(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers whose size spans decades from one row to the next."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 10 ** torch.randn(*shape[:-1], 1, generator=generator)
    return x.to(device, dtype)


def tables(tokens: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) of YaRN: lengths other than one."""
    angles = torch.rand(tokens, 1, half, generator=torch.Generator().manual_seed(9)) * 6.0
    return (angles.cos() * 1.3).to(device), (angles.sin() * 1.3).to(device)


class Step:
    """Sequences of these contexts in scrambled pages of a filled cache, of each of which the last tokens decode."""

    def __init__(self, contexts: list[int], news: list[int], dtype: torch.dtype, device: torch.device) -> None:
        self.heads, self.nope, self.value, self.latent, self.width = 5, 20, 12, 24, 8
        pages = sum(-(-context // 8) for context in contexts)
        self.cache = PagedCache(1, self.latent + self.width, pages, 8, dtype, device)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(4)).tolist()
        pieces = []
        for context, new in zip(contexts, news, strict=True):
            own = [order.pop() for _ in range(-(-context // 8))]
            rows = torch.tensor([page * 8 + at for page in own for at in range(8)], device=device)
            self.cache.data[0, rows] = math.nan  # behind the context stands what another sequence left
            filled = decades(context, self.latent + self.width, seed=context, dtype=dtype, device=device)
            self.cache.data[0, rows[:context]] = filled
            pieces.append((Sequence(own, context - new), new, True))
        self.batch = self.cache.batch(pieces)
        size = self.heads * (self.nope + self.width)
        self.q_TQ = torch.cat([decades(c, size, seed=c + 7, dtype=dtype, device=device)[-n:]
                               for c, n in zip(contexts, news, strict=True)])  # fmt: skip
        self.weight = decades(self.heads * (self.nope + self.value), self.latent, seed=3, dtype=dtype, device=device)
        positions = [p for c, n in zip(contexts, news, strict=True) for p in range(c - n, c)]
        cos, sin = tables(max(positions) + 1, self.width // 2, device)
        self.rope = cos[positions], sin[positions]

    @property
    def decoding(self) -> Decoding:
        assert self.batch.decoding is not None
        return self.batch.decoding

    def run(self) -> Tensor:
        """The three kernels in a row: [T, H * V]."""
        q_NHX = absorb_queries_triton(self.q_TQ, self.weight, self.rope, self.decoding, self.heads, True)
        return self.attend(q_NHX)

    def attend(self, q_NHX: Tensor) -> Tensor:
        mean_WHC, lse_WH = attend_latents_triton(q_NHX, self.cache.data[0], self.decoding, self.latent, SCALE)
        out_TX = self.q_TQ.new_empty(len(self.q_TQ), self.heads * self.value)
        expand_values_triton(mean_WHC, lse_WH, self.weight, self.decoding, self.nope, out_TX)
        return out_TX

    def rows(self, token: int) -> Tensor:
        """The context of a decoded token, float64 [J, C + R]."""
        span = next(span for span in self.batch.spans if token < span.stop)
        return self.cache.data[0][span.rows][: span.context - (span.stop - 1 - token)].double()
