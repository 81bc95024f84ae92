"""`MoELayer`: routing, exchange and experts composed, over any number of ranks.

Legend: T tokens on this rank, D hidden, E logical experts, K experts per token, R rows received by this rank.

    x_TD --router--> ids_TK, weights_TK --plan--> who sends which row where
      |---dispatch (rows in flight)---> inbound rows_RD --experts--> out_RD ---combine---> y_TD
      |---shared experts, meanwhile--------------------------------------------------------> + --> result

`stages` is that with a pause where rows are in flight, so that another batch can compute meanwhile
(`crossdock.moe.two_batch`); `forward` is `stages` without pauses. Both work chunk by chunk where asked
(`crossdock.moe.pipeline`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from crossdock.backend import Backend
from crossdock.comm import make_dispatcher
from crossdock.comm.transport import Transport
from crossdock.errors import ConfigError
from crossdock.gemm import Codes
from crossdock.moe.config import FLAT, ExchangeConfig, MoEConfig
from crossdock.moe.experts import Experts, Fp8Experts, PackedExperts
from crossdock.moe.fused import alone, make_both
from crossdock.moe.mlp import Fp8MLP, SwigluMLP
from crossdock.moe.pace import Work
from crossdock.moe.pipeline import Pipeline
from crossdock.moe.trace import recorder_of, unwatched
from crossdock.moe.two_batch import Steps, run
from crossdock.moe.wire import Fp8Wire
from crossdock.parallel import ExpertPlacement, nearest_replicas
from crossdock.routing import Router

# all that follows from who the ranks are, what they hold and how rows travel
STANDING = ("dispatcher", "placement", "exchange", "recorder", "pipeline", "slots_EX", "replicas_E", "choose_replicas",
            "is_alone")  # fmt: skip


@runtime_checkable
class FindsLater(Protocol):
    """A form of the exchange whose device finds what is wrong, behind a host that goes on meanwhile."""

    def check(self) -> None:
        """Waits for the device, and raises what it has found."""
        ...


class MoELayer(nn.Module):
    """One MoE layer whose experts are spread over the ranks of `transport` as `placement` says.

    Every rank calls `forward` together, with as many tokens of its own as it has (none is allowed). Router and shared
    experts are whole on every rank; experts are this rank's slots only. `load_E` (int64) counts the (token, k) choices
    of this rank's tokens per logical expert since it was last zeroed.

    `dtype` is that of tokens and experts (with fp8 experts, of what comes out of them). `backend` "auto" is Triton on a
    GPU and torch elsewhere. Raises ConfigError where placement, transport, config and `exchange` disagree. Building a
    layer with hierarchy "node" over several nodes is a collective.
    """

    def __init__(
        self,
        config: MoEConfig,
        transport: Transport,
        placement: ExpertPlacement | None = None,
        *,
        exchange: ExchangeConfig = FLAT,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        placement = placement or ExpertPlacement.contiguous(config.num_experts, transport.world_size)
        self.config, self.dtype = config, dtype
        self.backend: Backend = backend
        self.router = Router(
            config.hidden_size,
            config.num_experts,
            top_k=config.top_k,
            score=config.score,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            renormalize=config.renormalize,
            scale=config.scale,
            selection_bias=config.selection_bias,
            device=device,
            backend=backend,
        )
        load_E = torch.zeros(config.num_experts, dtype=torch.int64, device=device)
        self.load_E: Tensor
        self.register_buffer("load_E", load_E, persistent=False)
        self.slots_EX: Tensor
        self.replicas_E: Tensor
        self._stand_on(transport, placement, exchange)
        self.experts: Experts | PackedExperts | Fp8Experts
        self.shared_experts: SwigluMLP | Fp8MLP | None
        slots, ranks = placement.slots_per_rank, transport.world_size
        self.experts, self.shared_experts = make_both(config, slots, ranks, dtype, device, backend)

    def _stand_on(self, transport: Transport, placement: ExpertPlacement, exchange: ExchangeConfig) -> None:
        """Sets everything in STANDING."""
        config, device = self.config, self.load_E.device
        if placement.world_size != transport.world_size:
            raise ConfigError(f"placement is for {placement.world_size} ranks, transport has {transport.world_size}")
        if placement.num_experts != config.num_experts:
            raise ConfigError(f"placement has {placement.num_experts} experts, config has {config.num_experts}")
        exchange.check_transport(transport.name, transport.world_size)
        codec = None
        if exchange.wire == "fp8":
            takes_codes = config.quant.kind == "fp8_block"
            pow2 = config.quant.pow2_scales
            codec = Fp8Wire(config.hidden_size, pow2=pow2, decode_on_arrival=not takes_codes, backend=self.backend)
        self.dispatcher = make_dispatcher(
            unwatched(transport) if exchange.mode == "latency" else transport,
            placement.num_slots,
            config.hidden_size,
            self.dtype,
            self.backend,
            hierarchy=exchange.hierarchy,
            mode=exchange.mode,
            codec=codec,
            max_tokens=exchange.max_tokens,
            capacity=exchange.capacity,
            on_overflow=exchange.on_overflow,
        )
        self.dispatcher.checksum_of_placement = placement.checksum
        self.placement, self.exchange, self.recorder = placement, exchange, recorder_of(transport)
        work = Work.of(config, self.dtype, placement.slots_per_rank, codec)
        self.pipeline = Pipeline(self.dispatcher, exchange, work, device, self.recorder)
        self.register_buffer("slots_EX", placement.logical_to_physical_EX.to(device), persistent=False)
        self.register_buffer("replicas_E", placement.replica_count_E.to(device), persistent=False)
        self.choose_replicas = not placement.is_identity
        changes_rows = exchange.wire == "fp8" and config.quant.kind != "fp8_block"
        self.is_alone = transport.world_size == 1 and not changes_rows

    def continue_on(
        self, transport: Transport, placement: ExpertPlacement, exchange: ExchangeConfig | None = None
    ) -> None:
        """Goes on over other ranks, such as those left after a failure; a collective of the new ranks.

        Weights stay where they are: `placement` must have in this rank's slots what they hold already, and may leave
        out only what other ranks held. `exchange` where rows are to travel otherwise than before: hierarchy "node"
        needs equally many ranks on each node. Raises ConfigError for what cannot be, and the layer is then as it was.
        """
        own = self.placement.experts_of_rank(self.dispatcher.transport.rank)
        given = placement.experts_of_rank(transport.rank) if transport.rank < placement.world_size else ()
        if given != own:
            raise ConfigError(f"this rank's slots hold experts {list(own)}, the new placement has {list(given)} there: "
                              "weights do not move with it")  # fmt: skip
        with as_before_on_errors([self]):
            self._stand_on(transport, placement, exchange or self.exchange)

    def set_replicas(self, slots_EX: Tensor, replicas_E: Tensor) -> None:
        """From the next call on this rank's token t takes slots_EX[e, t % replicas_E[e]] for expert e.

        int64 [E, X] and [E]; tables may differ from rank to rank, as any replica gives the same bits. Raises
        ConfigError where a table names a slot that does not hold the expert.
        """
        size_E, slots_E = self.config.num_experts, len(self.placement.physical_to_logical)
        if replicas_E.shape != (size_E,) or slots_EX.dim() != 2 or len(slots_EX) != size_E:
            found = f"{list(slots_EX.shape)} and {list(replicas_E.shape)}"
            raise ConfigError(f"replica tables must have shapes [{size_E}, X] and [{size_E}], found {found}")
        for expert, (slots, count) in enumerate(zip(slots_EX.tolist(), replicas_E.tolist(), strict=True)):
            named = slots[:count]
            if not 1 <= count <= len(slots):
                raise ConfigError(f"expert {expert} must have 1 to {len(slots)} replicas, found {count}")
            for slot in named:
                if not 0 <= slot < slots_E or self.placement.physical_to_logical[slot] != expert:
                    raise ConfigError(f"replica tables send expert {expert} to slot {slot}, which does not hold it")
        device = self.load_E.device
        self.slots_EX, self.replicas_E = slots_EX.to(device), replicas_E.to(device)
        self.choose_replicas = True

    def prefer_near_replicas(self, slack: float = 0.1) -> None:
        """From the next call on a token takes the nearest replica of an expert: its rank's own, else one on its node.

        A collective, in which ranks tell one another `load_E`: none of an expert's replicas gets more than (1 + slack)
        times an even share of that. Raises ConfigError for a slack below 0.
        """
        transport = self.dispatcher.transport
        loads_WE = transport.all_gather(self.load_E.tolist(), "loads of experts")
        if not self.placement.is_identity:
            self.set_replicas(*nearest_replicas(self.placement, transport.topology, transport.rank, loads_WE, slack))

    def check(self) -> None:
        """Raises what is wrong with the calls so far, for which latency mode on a GPU waits; others have raised it."""
        if self.exchange.mode == "latency" and isinstance(self.dispatcher, FindsLater):
            self.dispatcher.check()

    @torch.no_grad()
    def pack(self) -> None:
        """Lays experts out for inference on this device once and for all, where that helps; the bits stay the same.

        The experts' parameters are gone after that: load and train before it.
        """
        if isinstance(self.experts, Experts):
            self.experts = self.experts.packed()

    def forward(self, x_TD: Tensor, codes: Codes | None = None) -> Tensor:
        """x [T, D] in the layer's dtype -> [T, D] in the same; a collective of all ranks.

        `codes` are x's of `quantize_rows`, where known. Raises ConfigError for another shape, dtype or device,
        PlanMismatch where ranks disagree, CapacityOverflow where a bounded buffer is too small, and RankFailure or
        CommTimeout where another rank is lost or does not come.
        """
        return run(self.stages(x_TD, codes))

    def stages(self, x_TD: Tensor, codes: Codes | None = None) -> Steps[Tensor]:
        """`forward`, pausing where anything travels: while the first rows do, and while the last results return."""
        with self.recorder.span("route"):
            tables = (self.slots_EX, self.replicas_E) if self.choose_replicas else None
            routing = self.router(x_TD, load_E=self.load_E, placement_tables=tables)
        slot_ids_TK = routing.expert_ids_TK if routing.slot_ids_TK is None else routing.slot_ids_TK
        if self.is_alone:
            y_TD = alone(self.experts, self.shared_experts, x_TD, slot_ids_TK, routing.weights_TK, codes)
            if y_TD is not None:
                return y_TD
        if self.dispatcher.transport.world_size == 1:
            return self._at_home(x_TD, slot_ids_TK, routing.weights_TK, codes)
        flow = self.pipeline.begin(x_TD, slot_ids_TK, routing.weights_TK)
        flow.start()
        yield
        shared_TD = self._share(x_TD, codes)
        for inbound in flow:
            with self.recorder.span("experts"):
                out_RD = self.experts(inbound)
            flow.give_back(out_RD, shared_TD)
        yield
        return flow.result()

    def _at_home(self, x_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, codes: Codes | None) -> Tensor:
        """The same where nothing travels: no chunks, no pauses, and less for the host to do between its operations."""
        with self.recorder.span("plan"):
            plan = self.dispatcher.plan(slot_ids_TK)
        with self.recorder.span("send"):
            inbound = self.dispatcher.dispatch(x_TD, plan)
        shared_TD = self._share(x_TD, codes)
        with self.recorder.span("experts"):
            out_RD = self.experts(inbound)
        with self.recorder.span("sums"):
            return self.dispatcher.combine(out_RD, weights_TK, inbound, shared_TD)

    def _share(self, x_TD: Tensor, codes: Codes | None) -> Tensor | None:
        if self.shared_experts is None:
            return None
        with self.recorder.span("shared experts"):
            rows = codes if codes is not None and isinstance(self.shared_experts, Fp8MLP) else x_TD
            shared_TD: Tensor = self.shared_experts(rows)
            return shared_TD


@contextmanager
def as_before_on_errors(layers: Sequence[MoELayer]) -> Iterator[None]:
    """Where the block raises, every one of the layers stands where it stood, whichever the block had moved."""
    before = [{name: getattr(layer, name) for name in STANDING} for layer in layers]
    try:
        yield
    except BaseException:
        for layer, standing in zip(layers, before, strict=True):
            for name, value in standing.items():
                setattr(layer, name, value)
        raise
