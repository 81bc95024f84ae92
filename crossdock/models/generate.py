"""Generation: prompts spread over the ranks, all ranks stepping together, with or without speculative drafting.

Legend: T flat tokens of a step on this rank, D hidden, V vocabulary, W ranks.

One loop serves every case. A step feeds each sequence's new tokens (its prompt first, then the last token, and behind
it the drafted one where there is a draft), samples after each, and keeps what agrees:

    step 0   prompt p0 p1 p2      -> t3                     draft from (p1 p2 t3, hidden of p0 p1 p2) -> d4
    step 1   t3 d4                -> t4 (= d4? then t5)     draft from (t4 t5, hidden of t3 d4)       -> d6
    step 2   t5 d6                -> ...

Several drafts a step are a chain: the MTP layer reads its own hidden state and its last draft for the next one, while
it is sure enough of them. What it caches on the way is written anew once the tokens are real.

Drafts only decide how many tokens a step yields, never which: the token sampled after t3 is what it would have been
alone, and d4's row is used only where it is that very token (exact for greedy and for sampling alike).
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from crossdock.comm.transport import Transport
from crossdock.errors import ConfigError, CrossdockError
from crossdock.models.cache import Batch, PagedCache, Sequence, Span
from crossdock.models.sampling import Sampling, sample
from crossdock.moe import MoELayer

PAGE_SIZE = 64  # tokens a page
DRAFT_TOKENS = 3  # at most, a step, where nothing else is asked for and the model has an MTP layer
LEAST_LIKELY = 0.3  # a chain of drafts goes on while the MTP layer holds all of it for at least as probable


class CausalModel(Protocol):
    """What generation asks of a model; forward and draft are collectives of all ranks."""

    @property
    def has_mtp(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def cache_layers(self) -> int: ...
    @property
    def cache_width(self) -> int: ...
    def __call__(self, ids_T: Tensor, batch: Batch, cache: PagedCache | None) -> Tensor: ...
    def draft(self, next_ids_T: Tensor, hidden_TD: Tensor, batch: Batch, cache: PagedCache | None) -> Tensor: ...
    def logits(self, hidden_TD: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Output:
    """One prompt's result. `digest` is sha256 over the fp32 logits of every generated position, in order."""

    prompt_ids: list[int]
    token_ids: list[int]
    digest: bytes


@dataclass(frozen=True)
class Generation:
    """Results of all prompts, the same on every rank; counts are summed over ranks, seconds are this rank's.

    prefill_s is until the first tokens are there, decode_s from then on, the drafting for the second ones included.
    """

    outputs: list[Output]
    drafted: int
    accepted: int
    prefill_s: float
    decode_s: float

    @property
    def digest(self) -> str:
        """One prompt: its logits' sha256. Several: sha256 of their digests in prompt order."""
        digests = [output.digest for output in self.outputs]
        return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


@dataclass
class _Active:
    """A sequence in flight: `ids` holds prompt and generated tokens, of which the cache holds `sequence.length`."""

    prompt: int
    ids: list[int]
    prompt_length: int
    sequence: Sequence = field(default_factory=Sequence)
    drafts: list[int] = field(default_factory=list)
    done: bool = False
    hasher: "hashlib._Hash" = field(default_factory=hashlib.sha256)


class _Generator:
    """The state of one `generate` call on one rank."""

    def __init__(
        self,
        model: CausalModel,
        prompts: list[list[int]],
        transport: Transport,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        draft_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.transport, self.sampling, self.device = model, transport, sampling, device
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self.moe_layers = [module for module in modules if isinstance(module, MoELayer)]
        self.max_new_tokens, self.stop_ids, self.draft_tokens = max_new_tokens, stop_ids, draft_tokens
        mine = range(transport.rank, len(prompts), transport.world_size)
        self.active = [_Active(i, list(prompts[i]), len(prompts[i])) for i in mine]
        pages = sum(-(-(a.prompt_length + max_new_tokens + max(1, draft_tokens)) // PAGE_SIZE) for a in self.active)
        self.cache = PagedCache(model.cache_layers, model.cache_width, max(pages, 1), PAGE_SIZE, dtype, device)
        self.drafted = self.accepted = 0
        self.sampled_at = 0.0  # when the last step had its tokens, before it drafted the next ones

    def room(self, prompt_length: int) -> int:
        """Tokens to generate: what was asked, as far as the context goes, the token behind its last one included."""
        return min(self.max_new_tokens, self.model.context_length - prompt_length + 1)

    def step(self, on_token: Callable[[int, int], None] | None) -> None:
        """One forward of all ranks, then the draft for the next."""
        live = [a for a in self.active if not a.done]
        fed = [a.ids[a.sequence.length :] + a.drafts for a in live]
        decode = [a.sequence.length > 0 for a in live]
        pieces = [(a.sequence, len(ids), is_decode) for a, ids, is_decode in zip(live, fed, decode, strict=True)]
        batch = self.cache.batch(pieces)
        hidden_TD = self.model(self._ids(fed), batch, self.cache)
        read = [row for span in batch.spans for row in _sampled_rows(span)]
        logits_RV = self.model.logits(hidden_TD[read]) if read else hidden_TD.new_empty(0, 0)
        for layer in self.moe_layers:  # sampling waits for the device anyway, and must not read what means nothing
            layer.check()
        row = 0
        kept: list[int] = []
        for a, ids, span in zip(live, fed, batch.spans, strict=True):
            count = len(_sampled_rows(span))
            new = self._accept(a, logits_RV[row : row + count], on_token)
            row += count
            kept.append(len(ids) if not span.decode else new)
        self.sampled_at = time.perf_counter()
        if self.draft_tokens:
            self._draft(live, batch, hidden_TD, kept, decode)
        for a, count in zip(live, kept, strict=True):
            a.sequence.length += count
            if a.done:
                self.cache.release(a.sequence)

    def _accept(self, a: _Active, logits_RV: Tensor, on_token: Callable[[int, int], None] | None) -> int:
        """Samples after each row until one differs from the draft fed behind it; returns the tokens gained."""
        gained = 0
        for logits_V, draft in zip(logits_RV, [*a.drafts, None], strict=True):
            if math.isnan(float(logits_V.sum())):
                raise CrossdockError(f"prompt {a.prompt}: the logits after {len(a.ids)} tokens are not finite")
            token = sample(logits_V, self.sampling, a.prompt, len(a.ids))
            a.hasher.update(logits_V.detach().cpu().contiguous().numpy().tobytes())
            a.ids.append(token)
            gained += 1
            if on_token is not None:
                on_token(a.prompt, token)
            a.done = token in self.stop_ids or self._left(a) == 0
            if a.done or token != draft:
                break
        self.drafted += len(a.drafts)
        self.accepted += gained - 1
        a.drafts = []
        return gained

    def _left(self, a: _Active) -> int:
        """Tokens that `a` has still to generate."""
        return a.prompt_length + self.room(a.prompt_length) - len(a.ids)

    def _draft(self, live: list[_Active], batch: Batch, hidden_TD: Tensor, kept: list[int], decode: list[bool]) -> None:
        """Runs the MTP layer over the tokens that were kept; its last row a sequence gives the first draft of the next
        step, and each further pass, over that draft alone, one more."""
        at = [i for i, a in enumerate(live) if not a.done]
        going = [live[i] for i in at]
        rows = [row for i in at for row in range(batch.spans[i].start, batch.spans[i].start + kept[i])]
        fed = [live[i].ids[live[i].sequence.length + 1 :][: kept[i]] for i in at]
        pieces = [(live[i].sequence, kept[i], decode[i]) for i in at]
        hidden_TD, chances = hidden_TD[rows], [1.0] * len(going)
        for number in range(1, self.draft_tokens + 1):
            if number > 1 and not self._anyone(len(going), "is anyone drafting"):
                return
            mtp_batch = self.cache.batch(pieces)
            drafted_TD = self.model.draft(self._ids(fed), hidden_TD, mtp_batch, self.cache)
            hidden_SD = drafted_TD[[span.stop - 1 for span in mtp_batch.spans]]
            likely, drafts = _likeliest(self.model.logits(hidden_SD)) if going else ([], [])
            chances = [chance * p for chance, p in zip(chances, likely, strict=True)]
            for a, draft in zip(going, drafts, strict=True):
                if self._left(a) > number:  # the step that verifies drafts adds a token of its own
                    a.drafts.append(draft)
            on = [s for s, a in enumerate(going) if chances[s] >= LEAST_LIKELY and self._left(a) > number + 1]
            pieces = [(Sequence(pieces[s][0].pages, pieces[s][0].length + pieces[s][1]), 1, True) for s in on]
            going, chances, fed = [going[s] for s in on], [chances[s] for s in on], [[drafts[s]] for s in on]
            hidden_TD = hidden_SD[on]

    def _ids(self, pieces: list[list[int]]) -> Tensor:
        return torch.tensor([i for piece in pieces for i in piece], dtype=torch.int64, device=self.device)

    def unfinished(self) -> bool:
        """Whether any rank has work left; a rank without any still takes part in the others' steps."""
        return self._anyone(sum(not a.done for a in self.active), "is anyone generating")

    def _anyone(self, count: int, phase: str) -> bool:
        return any(found for (found,) in self.transport.all_gather([count], phase))


def _likeliest(logits_SV: Tensor) -> tuple[list[float], list[int]]:
    """Each row's largest probability and its token."""
    largest = logits_SV.softmax(-1).max(-1)
    return largest.values.tolist(), logits_SV.argmax(-1).tolist()


def _sampled_rows(span: Span) -> range:
    """The rows of a span after which a token is sampled: all of a decoding one, the last of a prompt."""
    return range(span.start if span.decode else span.stop - 1, span.stop)


def _check(model: CausalModel, prompts: list[list[int]], max_new_tokens: int, draft_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if not prompts:
        raise ConfigError("expected at least one prompt, found none")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {number} has no tokens")
        if len(prompt) > model.context_length:
            raise ConfigError(f"prompt {number} has {len(prompt)} tokens, the model's context {model.context_length}")
        outside = next((i for i in prompt if not 0 <= i < model.vocab_size), None)
        if outside is not None:
            raise ConfigError(f"prompt {number} holds token id {outside}, expected 0 to {model.vocab_size - 1}")
    if draft_tokens < 0:
        raise ConfigError(f"draft_tokens must be at least 0, found {draft_tokens}")
    if draft_tokens and not model.has_mtp:
        raise ConfigError(f"draft_tokens is {draft_tokens}, but the checkpoint has no MTP layer to draft with")


@torch.inference_mode()
def generate(
    model: CausalModel,
    prompts: list[list[int]],
    transport: Transport,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: frozenset[int] = frozenset(),
    draft_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Generates after each prompt; every rank calls this with the same prompts, rank r works on prompts r, r + W, ...

    A sequence ends at a stop id, after max_new_tokens, or where the model's context does. Up to `draft_tokens` are
    drafted by the MTP layer and verified together in each step. `dtype` is the cache's. `on_token(prompt, token)` is
    called on the rank that owns the prompt. Raises ConfigError for a prompt that is empty, longer than the context or
    holds an id outside the vocabulary, for max_new_tokens below 1, and for drafts of a model without an MTP layer,
    CrossdockError for logits that are not finite, and what `MoELayer.check` raises.
    """
    _check(model, prompts, max_new_tokens, draft_tokens)
    sampling, device = sampling or Sampling(), torch.device(device)
    run = _Generator(model, prompts, transport, sampling, max_new_tokens, stop_ids, draft_tokens, dtype, device)
    began = time.perf_counter()
    run.step(on_token)
    prefilled = run.sampled_at
    while run.unfinished():
        run.step(on_token)
    decoded = time.perf_counter()
    return _gather(run, prompts, prefilled - began, decoded - prefilled)


def _gather(run: _Generator, prompts: list[list[int]], prefill_s: float, decode_s: float) -> Generation:
    """Every rank's results on every rank: token ids and digests travel as small integers."""
    own: list[int] = [run.drafted, run.accepted]
    for a in run.active:
        token_ids = a.ids[a.prompt_length :]
        own += [a.prompt, len(token_ids), *token_ids, *a.hasher.digest()]
    longest = max(length for (length,) in run.transport.all_gather([len(own)], "length of results"))
    outputs: dict[int, Output] = {}
    drafted = accepted = 0
    for values in run.transport.all_gather(own + [-1] * (longest - len(own)), "results"):
        drafted, accepted, at = drafted + values[0], accepted + values[1], 2
        while at < len(values) and values[at] >= 0:
            prompt, count = values[at : at + 2]
            tokens, digest = values[at + 2 : at + 2 + count], bytes(values[at + 2 + count : at + 34 + count])
            outputs[prompt] = Output(prompts[prompt], tokens, digest)
            at += 34 + count
    return Generation([outputs[i] for i in range(len(prompts))], drafted, accepted, prefill_s, decode_s)
