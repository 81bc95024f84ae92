"""`LatencyDispatcher`: the exchange for decoding. Bounded buffers, no counts exchanged first, no host in between.

Each rank has a region of `capacity` rows for every source, in a buffer that stays where it is. A sender orders its rows
by slot on the device, stores those for a rank into its region there together with how many they are for each slot, and
signals. The receiver turns these numbers into the order (slot, source rank, token, k) without moving a row: products
gather by `row_ids_R`, and results go straight to where the token's rank adds them up, in the order of k. So the bits
are those of the flat exchange. Shapes depend on T, K and the bounds alone, never on the routing, and on a GPU the host
waits for nothing, so that a step can be captured in a CUDA graph (after one step that was not).

What is wrong is found on the device and raised by the host: at once on a CPU; on a GPU by the next call or by `check`,
and what was computed meanwhile means nothing. So on a GPU too many rows are the end of the group, as all else is that
goes wrong; a CPU goes on behind them. `on_overflow="grow"` has the host wait for each dispatch, which a graph cannot
hold. Gradients are for the other forms.

Rejected: a slab for each slot (L times the memory), and rows put in order as they arrive (a copy and a launch more).

Legend: T tokens here, D hidden, K experts per token, P slots, L slots a rank, W ranks, R rows of the buffer, X bytes of
a row as it travels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.comm.agreement import gather_agreed
from crossdock.comm.codec import Codec
from crossdock.comm.combine import need_gradient, weighted_sum
from crossdock.comm.form import ExchangeForm
from crossdock.comm.inbound import Inbound
from crossdock.comm.latency_bounds import Bounds, Fingerprint, Found, earliest, mismatch, overflow, phase_of
from crossdock.comm.latency_tracks import Track, TrackForm, Tracks
from crossdock.comm.one_sided import HEADER, Parcel
from crossdock.comm.one_sided_arrange import Arranged, arrange_rows_ref, arrange_rows_triton
from crossdock.comm.one_sided_wait import TOO_MANY, Awaited
from crossdock.comm.plan import DispatchPlan, Outgoing, check_form, check_slots
from crossdock.comm.plan_kernel import place_rows_ref, place_rows_triton
from crossdock.comm.symmetric import ANY, SymmetricTransport
from crossdock.comm.symmetric_mailbox import Mailbox, ended
from crossdock.comm.transport import Pending, Then, Transport
from crossdock.errors import ConfigError
from crossdock.parallel.standing import Failure, Turn


@dataclass(frozen=True, kw_only=True)
class LatencyPlan(DispatchPlan):
    """This rank's rows by slot: starts_P1 (int32 [P + 1]) is where each slot's begin, and the end.

    What would come from other ranks, counts and ends_L, is empty here: it comes with the rows.
    """

    starts_P1: Tensor

    def explain(self) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError("how many rows a plan of latency mode sends and gets only the device knows: plan in another "
                          "mode to have it explained")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LatencyInbound(Inbound):
    """rows_RD is the buffer itself, or on a CPU's torch backend the rows in slot order; it is read before combine."""

    track: Track
    tracks: Tracks
    arranged: Arranged
    awaits: object


class LatencyDispatcher(ExchangeForm):
    """The calls of `Dispatcher` for at most `max_tokens` tokens of a rank at a time, over the symmetric transport.

    capacity     most rows from one rank to another; 0: as many as can occur where the slots of a token differ
    on_overflow  where more tokens or rows come: "raise" CapacityOverflow, on every rank, or "grow" and go again; on a
                 GPU, where it is raised late, no rank of the group can go on after it

    At most two dispatches may be under way before the first one's combine has been waited for. Raises ConfigError for
    another transport, and where P does not divide over the ranks.
    """

    mode = "latency"

    def __init__(
        self,
        transport: Transport,
        num_slots: int,
        hidden_size: int,
        dtype: torch.dtype,
        backend: Backend = "auto",
        codec: Codec | None = None,
        *,
        max_tokens: int = 128,
        capacity: int = 0,
        on_overflow: Literal["raise", "grow"] = "raise",
    ) -> None:
        if not isinstance(transport, SymmetricTransport):
            raise ConfigError(f"the low-latency mode needs transport 'symmetric', found {transport.name!r}")
        if transport.device.type != "cpu" and resolve_backend(backend, transport.device) != "triton":
            raise ConfigError("on a GPU the low-latency mode needs backend 'triton': the others wait for the host")
        super().__init__(transport, num_slots, hidden_size, dtype, backend, codec)
        self._symmetric = transport
        self.bounds = Bounds(max_tokens, capacity, num_slots // transport.world_size, on_overflow)
        self._top_k = 0
        self._agreed = False

    def plan(self, slot_ids_TK: Tensor, weights_TK: Tensor | None = None, *, checked: bool = False) -> LatencyPlan:
        """The order of this rank's rows, from slot ids int64 [T, K] in 0..P-1 or -1 for no expert.

        Purely local but for the first call, a collective in which ranks agree about their options. On a GPU an id out
        of range is no expert unless `checked`, which waits for the device. Raises ConfigError for one, for another
        shape and for another K than before, and PlanMismatch where ranks do not agree. Weights have no use before
        combine.
        """
        check_form(slot_ids_TK)
        top_k, on_host = slot_ids_TK.shape[1], slot_ids_TK.device.type == "cpu"
        if self._top_k not in (0, top_k):
            raise ConfigError(f"MoE layer {self.layer}: experts per token is {top_k}, expected {self._top_k} as before")
        if checked or on_host:
            check_slots(slot_ids_TK.cpu().numpy(), self.num_slots)
        self.step += 1
        self._top_k = top_k
        if not self._agreed:
            self._agree(phase_of("plan", self.step, self.layer))
        place = place_rows_triton if self._on_triton(slot_ids_TK) else place_rows_ref
        order_N, token_N, position_TK, ends_P = place(slot_ids_TK, self.num_slots)
        outgoing, starts_P1 = Outgoing(order_N, position_TK, []), F.pad(ends_P, (1, 0))
        return LatencyPlan(outgoing, [], [], ends_P[:0], None, None, self.step, token_N, starts_P1=starts_P1)

    def plans(
        self, parts: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, checked: bool = False
    ) -> list[LatencyPlan]:
        """`plan` of several exchanges."""
        return [self.plan(slot_ids_TK, checked=checked) for slot_ids_TK in parts]

    def dispatch(self, x_TD: Tensor, plan: LatencyPlan) -> LatencyInbound:
        """Sends x[t] to each slot chosen for t, and receives. Raises ConfigError for another shape or dtype."""
        return self.dispatch_async(x_TD, plan).wait()

    def dispatch_async(self, x_TD: Tensor, plan: LatencyPlan) -> Pending[LatencyInbound]:
        """The same in two: this sends, `wait` receives."""
        self.check_rows("x_TD", x_TD, len(plan.outgoing.position_TK))
        _check_no_gradient(x_TD)
        tracks = self._made()
        rows_TX, turn = self.encoded(x_TD).contiguous(), self._enter("dispatch", plan, tracks)
        track = self._take_and_send(tracks, rows_TX, plan, turn)
        return Then(lambda: self._receive(track, tracks, rows_TX, plan, turn))

    def combine(self, out_RD: Tensor, weights_TK: Tensor, inbound: Inbound, plus_TD: Tensor | None = None) -> Tensor:
        """y[t] = sum over k of weights[t, k] * (the result of t's k-th slot) (+ plus[t]), as `Dispatcher.combine`."""
        return self.combine_async(out_RD, weights_TK, inbound, plus_TD).wait()

    def combine_async(
        self, out_RD: Tensor, weights_TK: Tensor, inbound: Inbound, plus_TD: Tensor | None = None
    ) -> Pending[Tensor]:
        """The same in two: this sends, `wait` receives and adds up. Once for each dispatch: then its buffers are taken
        for another. Raises ConfigError for a second time."""
        if not isinstance(inbound, LatencyInbound):
            raise ConfigError("combine must get what this form of the exchange dispatched, found rows of another form")
        if inbound.awaits is not inbound.track.awaits:
            raise ConfigError(f"{phase_of('combine', inbound.plan.step, self.layer)}: its rows were combined before")
        plan, track, tracks, arranged = cast(LatencyPlan, inbound.plan), inbound.track, inbound.tracks, inbound.arranged
        rows = len(inbound.rows_RD if inbound.row_ids_R is None else inbound.row_ids_R)
        self.check_combine(out_RD, rows, weights_TK, tuple(plan.outgoing.position_TK.shape), plus_TD)
        _check_no_gradient(out_RD, weights_TK, plus_TD)
        turn, rows_RD, words = self._enter("combine", plan, tracks), out_RD.detach().contiguous(), self._words(plan)
        places = arranged.first_W, arranged.last_W
        track.awaits = None
        track.back.send(Parcel(rows_RD, *places, (*words, 0), ANY, arranged.place_R, arranged.to_W))

        def finish() -> Tensor:
            self._await(track.back, tracks, Awaited(words, ANY, ANY), turn)
            track.busy = False
            shape = weights_TK.numel(), self.hidden_size
            back_SD = track.back.rows(0, shape, self.dtype)
            return weighted_sum(back_SD, weights_TK, plan.outgoing.position_TK, plus_TD, self.backend)

        return Then(finish)

    def check(self) -> None:
        """Waits for the device, and raises what its waits have found; on a CPU all of it has been raised."""
        if self._symmetric.device.type != "cpu":
            torch.cuda.current_stream().synchronize()
            self._raise_found(*self._symmetric.all_tracks())

    def _agree(self, phase: str) -> None:
        gather_agreed(self.transport, self.bounds.told_in(self.header(self._top_k)), [], phase)
        if self.bounds.on_overflow == "grow":
            self.bounds = self._symmetric.grown.setdefault((self._form(), self._top_k), self.bounds)
        if self.bounds.tracks is None:
            self._make_tracks(phase)
        self._agreed = True

    def _form(self) -> TrackForm:
        return self.bounds.form(self._top_k, self.row_bytes, self.hidden_size * self.dtype.itemsize)

    def _make_tracks(self, phase: str) -> None:
        self.bounds.tracks = self._symmetric.tracks(self._form(), phase)

    def _made(self) -> Tracks:
        assert self.bounds.tracks is not None, "a plan has made them"
        return self.bounds.tracks

    def _enter(self, what: str, plan: DispatchPlan, tracks: Tracks) -> Turn:
        self._raise_found(tracks)
        return self._symmetric.line.enter(phase_of(what, plan.step, self.layer))

    def _words(self, plan: DispatchPlan) -> tuple[int, int]:
        return Fingerprint.of(self.layer, plan.step, self.num_slots, self.hidden_size, self.dtype, self._top_k).words

    def _on_triton(self, tensor: Tensor) -> bool:
        return resolve_backend(self.backend, tensor.device) == "triton"

    def _take_and_send(self, tracks: Tracks, rows_TX: Tensor, plan: LatencyPlan, turn: Turn) -> Track:
        track = tracks.take(turn.phase)
        try:
            self._send(track, tracks, rows_TX, plan)
        except BaseException:
            tracks.put_back(track)
            raise
        return track

    def _send(self, track: Track, tracks: Tracks, rows_TX: Tensor, plan: LatencyPlan) -> None:
        form, starts_P1, tokens = tracks.form, plan.starts_P1, len(rows_TX)
        allowed = form.capacity if tokens * self._top_k <= form.back_rows else -1
        first_W, last_W = starts_P1[: -1 : form.slots], starts_P1[form.slots :: form.slots]
        message_WM = starts_P1.unfold(0, form.slots + 1, form.slots)
        words = (*self._words(plan), tokens)
        track.out.send(Parcel(rows_TX, first_W, last_W, words, allowed, plan.token_R, message_WM=message_WM))

    def _receive(self, track: Track, tracks: Tracks, rows_TX: Tensor, plan: LatencyPlan, turn: Turn) -> LatencyInbound:
        form = tracks.form
        awaited = Awaited(self._words(plan), form.capacity, form.back_rows // self._top_k)
        found = self._await(track.out, tracks, awaited, turn, with_host=self.bounds.on_overflow == "grow")
        if any(what == TOO_MANY for what, *_ in found):
            self.transport.all_gather([0], turn.phase)  # nobody uses the track again before all have read this
            track.busy = False
            failure = overflow(found, awaited, self.transport.members, self._symmetric.line.watch.rank)
            if self.bounds.on_overflow == "raise" and failure is not None:
                raise failure.error(failure.by, turn.phase)
            self.bounds.grow(found, self._top_k)
            self._make_tracks(turn.phase)
            tracks = self._made()
            track = self._take_and_send(tracks, rows_TX, plan, turn)
            return self._receive(track, tracks, rows_TX, plan, self._symmetric.line.enter(turn.phase))
        return self._arrange(track, tracks, plan)

    def _await(self, box: Mailbox, tracks: Tracks, awaited: Awaited, turn: Turn, with_host: bool = False) -> Found:
        """The host's wait on a CPU, and where it must know; else the device's, whose findings are read later."""
        if box.kind == "cpu" or with_host:
            found = box.receive(awaited, self._symmetric.line, turn)
            self._raise_failure(mismatch(found, self.transport.members), turn.phase)
            return found
        box.await_on_device(awaited, polls=max(1, int(self.transport.timeout_s * tracks.polls_per_s)))
        tracks.post(box, turn)
        return []

    def _raise_found(self, *made: Tracks) -> None:
        """Raises what waits on the device are known to have found, and ends the group; does not wait for them."""
        troubles = [trouble for tracks in made for trouble in tracks.troubled()]
        if not troubles:
            return
        line, members = self._symmetric.line, self.transport.members
        found, awaited, turn = earliest(troubles)
        self._raise_failure(mismatch(found, members), turn.phase)
        self._raise_failure(overflow(found, awaited, members, line.watch.rank), turn.phase)
        line.wait(turn._replace(began=time.monotonic() - self.transport.timeout_s), lambda _: False)

    def _raise_failure(self, failure: Failure | None, phase: str) -> None:
        if failure is not None:
            raise ended(self._symmetric.line, failure, phase)

    def _arrange(self, track: Track, tracks: Tracks, plan: LatencyPlan) -> LatencyInbound:
        form, world, box = tracks.form, self.transport.world_size, track.out
        on_triton = self._on_triton(plan.starts_P1)
        arrange = arrange_rows_triton if on_triton else arrange_rows_ref
        arranged = arrange(box.messages[:, HEADER:], box.status, form.region_rows)
        width, dtype = (self.hidden_size, self.dtype) if self.codec is None else (form.row_bytes, torch.uint8)
        rows_RX = box.rows(0, (world * form.region_rows, width), dtype)
        row_ids_R: Tensor | None = arranged.row_ids_R
        if not on_triton:  # on a CPU, where the host knows how many there are
            rows_RX, row_ids_R = rows_RX.index_select(0, arranged.row_ids_R[: int(arranged.ends_L[-1])]), None
        return LatencyInbound(
            rows_RX, arranged.ends_L, plan, row_ids_R, self.codec, self.dtype,
            track=track, tracks=tracks, arranged=arranged, awaits=track.awaits,
        )  # fmt: skip


def _check_no_gradient(*tensors: Tensor | None) -> None:
    if need_gradient(*tensors):
        raise ConfigError("the low-latency mode has no gradients: use mode 'throughput', or torch.no_grad()")
