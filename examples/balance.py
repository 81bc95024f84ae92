"""From measured load to a placement with replicas: same bits, less on the busiest rank.

    python examples/balance.py

Legend: T tokens, D hidden, E experts, P slots.
"""

import torch
from torch import Tensor

from crossdock import ExpertPlacement, LocalWorld, MoEConfig, MoELayer, rebalance
from crossdock.comm import Transport
from crossdock.parallel import balance_report

EXPERTS, SLOTS, RANKS = 16, 24, 4
config = MoEConfig(hidden_size=32, expert_size=24, num_experts=EXPERTS, top_k=2)
rng = torch.Generator().manual_seed(0)
x_TD = torch.randn(512, 32, generator=rng) + 0.5  # a common part, so that some experts are hot
weights = [torch.randn(EXPERTS, *shape, generator=rng) / 6 for shape in ((32,), (48, 32), (32, 24))]


@torch.no_grad()
def run(transport: Transport, placement: ExpertPlacement) -> tuple[Tensor, Tensor]:  # y_TD, load_E
    layer = MoELayer(config, transport, placement, dtype=torch.float32)
    layer.router.weight.copy_(weights[0])
    for held, whole in ((layer.experts.gate_up, weights[1]), (layer.experts.down, weights[2])):
        held.copy_(whole[list(placement.experts_of_rank(transport.rank))])
    return layer(x_TD.chunk(RANKS)[transport.rank]), layer.load_E


before = ExpertPlacement.contiguous(EXPERTS, RANKS)
rows, loads = zip(*LocalWorld(RANKS).run(lambda t: run(t, before)), strict=True)
load_1E = torch.stack(loads).sum(0, keepdim=True)  # one layer
slots_1P, _, _ = rebalance(load_1E, SLOTS, num_groups=1, num_nodes=1, num_gpus=RANKS)
for when, placed_1P in (("before", torch.tensor([before.physical_to_logical])), ("after", slots_1P)):
    print(when, balance_report(load_1E, placed_1P, RANKS), sep=": ")
after = ExpertPlacement(EXPERTS, RANKS, tuple(slots_1P[0].tolist()))
again, _ = zip(*LocalWorld(RANKS).run(lambda t: run(t, after)), strict=True)
print("same bits:", torch.equal(torch.cat(rows), torch.cat(again)))
