"""A placement by hand: five experts on three ranks, the hot one on each of them, and slots that stay empty.

    python examples/own_placement.py

Legend: T tokens, D hidden, E experts.
"""

import torch

from crossdock import ExpertPlacement, LocalWorld, MoEConfig, MoELayer
from crossdock.comm import Transport

config = MoEConfig(hidden_size=32, expert_size=24, num_experts=5, top_k=2)
placement = ExpertPlacement(5, 3, (0, 1, -1, 0, 2, 3, 0, 4, -1))  # three slots a rank, -1: no expert
x_TD = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))


def draw(expert: int, *shape: int) -> torch.Tensor:
    """Weights of an expert: the same wherever it stands, and in each of its replicas."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + expert)) / 6


@torch.no_grad()
def forward(transport: Transport, placement: ExpertPlacement | None = None) -> torch.Tensor:
    layer = MoELayer(config, transport, placement, dtype=torch.float32)
    layer.router.weight.copy_(draw(-1, 5, 32))
    for slot, expert in enumerate(layer.placement.experts_of_rank(transport.rank)):
        if expert >= 0:
            layer.experts.gate_up[slot] = draw(expert, 48, 32)
            layer.experts.down[slot] = draw(expert, 32, 24)
    return layer(x_TD.chunk(transport.world_size)[transport.rank])


y_TD = torch.cat(LocalWorld(3).run(lambda transport: forward(transport, placement)))
for rank in range(3):
    print(f"rank {rank} holds experts", *(e for e in placement.experts_of_rank(rank) if e >= 0))
print("tokens 0 to 3 find expert 0 in slots", placement.slot_ids(torch.zeros(4, 1, dtype=torch.int64))[:, 0].tolist())
print("same bits as on one rank:", torch.equal(y_TD, LocalWorld(1).run(forward)[0]))
