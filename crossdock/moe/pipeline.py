"""Chunks: while the experts work on one, the next one's rows arrive and the last one's results return.

A `Flow` is one call of a layer. All its plans are made first, because counts gathered behind rows would wait for them
on the same connections; then rows leave in the one order that all ranks keep (four chunks, D dispatch, C combine):

    started    D0 D1         C0 D2         C1 D3         C2            C3
    computing       [shared] [experts 0]   [experts 1]   [experts 2]   [experts 3]   [sums]

Nothing hides the first arrival but shared experts, and nothing the last return but sums: the first and last chunk are
half as large as the others, which with four chunks leaves a sixth of the traffic in sight instead of a quarter.

A row's bits do not depend on its chunk: routing and slots are found for all tokens before they are divided, a row's
product does not depend on its company, and a token's results are added up within its chunk as they would be alone.

Over nodes rows travel in two legs (`Legs`). The first ones are slow, and leave for all chunks at once; the second is
started while the chunk before computes. Of the first chunk the node's own rows are computed while the others fly; of
one that is the only one the others are computed amid these, which hides both ways for one pass over the weights more.

Rejected: chunks of experts instead of tokens. Each expert's weights would be read once, but a token would cross to a
node once for each chunk, and one loaded expert is one chunk that nothing hides.
Rejected: sending every chunk at once also where there is one leg. It keeps all rows of a call in memory, and where the
rate of a link is the bound it is no faster, as the link is never idle either way.

Legend: T tokens, D hidden, K experts per token, R rows received.
"""

import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from crossdock.comm import Exchange, HierarchicalDispatcher, Inbound
from crossdock.comm.legs import Arriving, Legs, Returning
from crossdock.comm.transport import Pending
from crossdock.moe.config import ExchangeConfig
from crossdock.moe.pace import Pace, Work
from crossdock.moe.streams import Here, make_place
from crossdock.moe.trace import NO_TRACE, NoTrace

T = TypeVar("T")


class Pipeline:
    """How the calls of one layer are divided into chunks; 0 chunks: as many as the cost model says, anew at each call.

    `work` is what a row costs, and is needed for 0 chunks only. Latency mode stays on its caller's stream: its kernels
    that send end before anything arrives.
    """

    def __init__(
        self,
        dispatcher: Exchange,
        exchange: ExchangeConfig,
        work: Work,
        device: torch.device,
        recorder: NoTrace = NO_TRACE,
    ) -> None:
        self.dispatcher, self.recorder = dispatcher, recorder
        is_throughput = exchange.mode == "throughput"
        self.place = make_place(device, dispatcher.transport, recorder) if is_throughput else Here()
        self.chunks = exchange.chunks
        nodes = dispatcher.transport.topology.num_nodes if isinstance(dispatcher, HierarchicalDispatcher) else 1
        self.pace = Pace(dispatcher.transport, work, device, nodes) if self.chunks == 0 else None

    def begin(self, x_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> "Flow":
        """The plans of all chunks of x [T, D]; no row moves yet. A collective; raises what `Dispatcher.plan` does."""
        whole = torch.is_grad_enabled() or not isinstance(self.dispatcher, HierarchicalDispatcher)
        if self.pace is not None:
            chunks, portions = self.pace.choose(len(x_TD), whole)
        else:  # one chunk stays whole: it may be a token's decoding, and portions are passes over the experts' weights
            chunks, portions = self.chunks, 1 if whole else min(self.chunks, 2)
        with self.recorder.span("plan"):
            return Flow(self, chunk_slices(len(x_TD), chunks), portions, x_TD, slot_ids_TK, weights_TK)


class Flow:
    """One call: `start`, then one `give_back` for each inbound that iteration gives, then `result`."""

    def __init__(
        self,
        pipeline: Pipeline,
        chunks: list[slice],
        portions: int,
        x_TD: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> None:
        self._dispatcher, self._place, self._pace = pipeline.dispatcher, pipeline.place, pipeline.pace
        self._recorder, self._chunks, self._top_k = pipeline.recorder, chunks, slot_ids_TK.shape[1]
        self._portions = portions  # of the first chunk; each of the others comes in one
        self._x, self._weights = _divide(x_TD, chunks), _divide(weights_TK, chunks)
        self._plans = self._dispatcher.plans(_divide(slot_ids_TK, chunks), self._weights)
        self._arriving: deque[Pending[Inbound]] = deque()
        self._returning: list[Pending[Tensor]] = []
        self._sent = 0
        self._began_s = self._began_work_s = self._left_work_s = self._products_s = 0.0
        self._seen = 0, 0.0, 0.0  # of one chunk: rows, seconds that their products took, and of these the thread's own

    def start(self) -> None:
        """The first chunk's rows leave, and the second's behind them; all chunks' where rows travel in `Legs`."""
        self._began_s, self._began_work_s = time.perf_counter(), time.process_time()
        self._send()
        while self._sent < len(self._chunks) and (self._sent < 2 or isinstance(self._arriving[0], Legs)):
            self._send()
        self._left_work_s = time.process_time()

    def _send(self) -> None:
        x_TD, plan = self._x[self._sent], self._plans[self._sent]
        with self._recorder.span("send"):
            self._arriving.append(self._place.start(lambda: self._dispatcher.dispatch_async(x_TD, plan), x_TD))
        self._sent += 1

    def __iter__(self) -> Iterator[Inbound]:
        """Each chunk's rows, when they are there; the next chunk's are under way by then."""
        self._products_s += time.process_time() - self._left_work_s  # shared experts', and what else came in between
        for chunk in range(len(self._chunks)):
            if self._sent < min(chunk + 2, len(self._chunks)):
                self._send()
            pending = self._arriving.popleft()
            parts = [pending]
            if self._portions > 1:
                assert isinstance(pending, Arriving)
                parts = pending.portions(self._portions)
            for number, part in enumerate(parts):
                asked_s = time.perf_counter()
                self._inbound = self._place.finish(part)
                if chunk == 0 and self._pace is not None and number == min(self._portions, 2) - 1:  # all have crossed
                    now_s, worked_s = time.perf_counter(), time.process_time() - self._began_work_s - self._products_s
                    sent = [len(x_TD) * self._top_k for x_TD in self._x[: self._sent]]
                    self._pace.saw_exchange(sent, now_s - self._began_s, now_s - asked_s, worked_s, self._portions)
                if chunk and self._arriving:  # whose first leg had the last chunk's products to arrive in
                    self._advance(self._arriving[0])
                self._given_s = time.perf_counter(), time.thread_time(), time.process_time()
                yield self._inbound
            if self._pace is not None:
                self._pace.saw_products(*self._seen, passes=min(self._portions, 2))
            self._seen, self._portions = (0, 0.0, 0.0), 1

    def give_back(self, out_RD: Tensor, plus_TD: Tensor | None) -> None:
        """The experts' results for the rows that iteration gave last; plus [T, D], of all tokens, joins the sums."""
        if self._pace is not None:
            (given_s, given_thread_s, given_work_s), (rows, took_s, worked_s) = self._given_s, self._seen
            self._products_s += time.process_time() - given_work_s
            took_s, worked_s = (took_s + time.perf_counter() - given_s, worked_s + time.thread_time() - given_thread_s)
            self._seen = rows + len(out_RD), took_s, worked_s
        with self._recorder.span("give back"):
            if self._portions > 1:
                self._return_portion(out_RD, plus_TD)
                return
            chunk, inbound, dispatcher = len(self._returning), self._inbound, self._dispatcher
            weights_TK, plus = self._weights[chunk], self._of_chunk(plus_TD, chunk)
            returning = self._place.start(
                lambda: dispatcher.combine_async(out_RD, weights_TK, inbound, plus), out_RD, weights_TK, plus
            )
        if self._returning:  # whose first leg had this chunk's products to return in
            self._advance(self._returning[-1])
        self._returning.append(returning)

    def _return_portion(self, out_RD: Tensor, plus_TD: Tensor | None) -> None:
        """Of the first chunk."""
        dispatcher, plan, inbound, portions = self._dispatcher, self._plans[0], self._inbound, self._portions
        if not self._returning:
            assert isinstance(dispatcher, HierarchicalDispatcher)
            weights_TK, plus = self._weights[0], self._of_chunk(plus_TD, 0)
            begin = partial(Returning, dispatcher, plan, weights_TK, plus, portions)
            self._returning.append(self._place.start(begin, weights_TK, plus))
        returning = self._returning[0]
        assert isinstance(returning, Returning)
        self._place.start(lambda: returning.start(out_RD, inbound), out_RD)

    def _of_chunk(self, plus_TD: Tensor | None, chunk: int) -> Tensor | None:
        return plus_TD if plus_TD is None or len(self._chunks) == 1 else plus_TD[self._chunks[chunk]]

    def result(self) -> Tensor:
        """y [T, D], when all results are back."""
        self._advance(self._returning[-1])
        with self._recorder.span("sums"):
            parts = [self._place.finish(returning) for returning in self._returning]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _advance(self, pending: Pending[T]) -> None:
        if isinstance(pending, Legs):
            self._place.start(pending.advance)


def chunk_slices(tokens: int, chunks: int) -> list[slice]:
    """Slices of the tokens, the first and the last half as long as the others; some are empty where tokens are few.

    >>> chunk_slices(12, 4)
    [slice(0, 2, None), slice(2, 6, None), slice(6, 10, None), slice(10, 12, None)]
    """
    halves = [0, *range(1, 2 * chunks - 2, 2), 2 * chunks - 2] if chunks > 1 else [0, 1]
    ends = [tokens * at // halves[-1] for at in halves]
    return [slice(begin, end) for begin, end in pairwise(ends)]


def _divide(tensor: Tensor, chunks: list[slice]) -> list[Tensor]:
    return [tensor] if len(chunks) == 1 else [tensor[chunk] for chunk in chunks]
