"""`MoELayer`: routing, exchange and experts composed, over any number of ranks.

Legend: T tokens on this rank, D hidden, E logical experts, K experts per token, R rows received by this rank.

    x_TD --router--> ids_TK, weights_TK --plan--> who sends which row where
      |---dispatch (rows in flight)---> inbound rows_RD --experts--> out_RD ---combine---> y_TD
      |---shared experts, meanwhile--------------------------------------------------------> + --> result
"""

import torch
from torch import Tensor, nn

from crossdock.backend import Backend
from crossdock.comm import Dispatcher
from crossdock.comm.transport import Transport
from crossdock.errors import ConfigError
from crossdock.moe.config import MoEConfig
from crossdock.moe.experts import Experts, Fp8Experts, PackedExperts, make_experts
from crossdock.moe.mlp import GatedMLP, SwigluMLP
from crossdock.parallel import ExpertPlacement
from crossdock.routing import Router


class MoELayer(nn.Module):
    """One MoE layer whose experts are spread over the ranks of `transport` as `placement` says.

    Every rank calls `forward` together, with as many tokens of its own as it has (none is allowed). Router and shared
    experts are whole on every rank; experts are this rank's slots only. `load_E` (int64) counts the (token, k) choices
    of this rank's tokens per logical expert since it was last zeroed.

    Raises ConfigError where placement and transport or config disagree.
    """

    def __init__(
        self,
        config: MoEConfig,
        transport: Transport,
        placement: ExpertPlacement | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        placement = placement or ExpertPlacement.contiguous(config.num_experts, transport.world_size)
        if placement.world_size != transport.world_size:
            raise ConfigError(f"placement is for {placement.world_size} ranks, transport has {transport.world_size}")
        if placement.num_experts != config.num_experts:
            raise ConfigError(f"placement has {placement.num_experts} experts, config has {config.num_experts}")
        self.config, self.placement = config, placement
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
        self.dispatcher = Dispatcher(transport, placement.num_slots, config.hidden_size, dtype, backend)
        self.slots_EX: Tensor
        self.replicas_E: Tensor
        self.register_buffer("slots_EX", placement.logical_to_physical_EX.to(device), persistent=False)
        self.register_buffer("replicas_E", placement.replica_count_E.to(device), persistent=False)
        self.experts: Experts | PackedExperts | Fp8Experts = make_experts(
            config, placement.slots_per_rank, dtype, device, backend
        )
        self.shared_experts: SwigluMLP | None = None
        if config.shared_size:
            mlp = GatedMLP if config.shared_gate else SwigluMLP
            self.shared_experts = mlp(config.hidden_size, config.shared_size, dtype, device, backend)
        self.load_E: Tensor
        self.register_buffer(
            "load_E", torch.zeros(config.num_experts, dtype=torch.int64, device=device), persistent=False
        )

    @torch.no_grad()
    def pack(self) -> None:
        """Lays experts out for inference on this device once and for all, where that helps; the bits stay the same.

        The experts' parameters are gone after that: load and train before it.
        """
        if isinstance(self.experts, Experts):
            self.experts = self.experts.packed()

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D] in x's dtype; a collective of all ranks."""
        tables = None if self.placement.is_identity else (self.slots_EX, self.replicas_E)
        routing = self.router(x_TD, load_E=self.load_E, placement_tables=tables)
        slot_ids_TK = routing.expert_ids_TK if routing.slot_ids_TK is None else routing.slot_ids_TK
        plan = self.dispatcher.plan(slot_ids_TK)
        arriving = self.dispatcher.dispatch_async(x_TD, plan)
        shared_TD = self.shared_experts(x_TD) if self.shared_experts is not None else None
        inbound = arriving.wait()
        out_RD = self.experts(inbound)
        return self.dispatcher.combine(out_RD, routing.weights_TK, inbound, shared_TD)
