"""An MoE layer over four virtual ranks in one process, held to the dense float64 reference.

    python examples/moe_layer.py

Legend: T tokens, D hidden, E experts, F expert inner size.
"""

import torch
from torch import Tensor

from crossdock import LocalWorld, MoEConfig, MoELayer
from crossdock.comm import Transport
from crossdock.moe import moe_ref

config = MoEConfig(hidden_size=64, expert_size=48, num_experts=16, top_k=4, score="sigmoid", num_groups=4, top_groups=2)
rng = torch.Generator().manual_seed(0)
x_TD = torch.randn(32, 64, generator=rng)
router_ED = torch.randn(16, 64, generator=rng)
gate_up_E2FD = torch.randn(16, 96, 64, generator=rng) / 8
down_EDF = torch.randn(16, 64, 48, generator=rng) / 7


@torch.no_grad()
def forward(transport: Transport) -> Tensor:
    """What every rank does: hold its experts, route its own tokens, call the layer together with the others."""
    layer = MoELayer(config, transport, dtype=torch.float32)
    mine = list(layer.placement.experts_of_rank(transport.rank))
    layer.router.weight.copy_(router_ED)
    layer.experts.gate_up.copy_(gate_up_E2FD[mine])
    layer.experts.down.copy_(down_EDF[mine])
    return layer(x_TD.chunk(transport.world_size)[transport.rank])


y_TD = torch.cat(LocalWorld(4).run(forward))
print("same bits on 1 and 4 ranks:", torch.equal(y_TD, torch.cat(LocalWorld(1).run(forward))))
expected_TD = moe_ref(config, x_TD, router_ED, gate_up_E2FD, down_EDF)
error = ((y_TD - expected_TD).abs().max() / expected_TD.abs().max()).item()
print(f"largest error beside float64, relative to the largest value: {error:.1e}")
