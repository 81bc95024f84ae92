"""One optimiser step of an MoE layer whose experts are spread over real ranks.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_layer.py     # or plain python, for a group of one

Legend: T tokens of all ranks, D hidden, E experts, F expert inner size.
"""

import torch

from crossdock import MoEConfig, MoELayer, init, make_transport
from crossdock.moe import sum_replicated_gradients

config = MoEConfig(hidden_size=32, expert_size=24, num_experts=8, top_k=2, shared_size=24)
rng = torch.Generator().manual_seed(0)  # the same on every rank
x_TD, target_TD = torch.randn(2, 64, 32, generator=rng)

with init("cpu") as group:  # init() takes this rank's GPU where there is one
    transport = make_transport(group)
    layer = MoELayer(config, transport, dtype=torch.float32, device=group.device)
    assert layer.shared_experts is not None
    mine = list(layer.placement.experts_of_rank(group.rank))
    with torch.no_grad():  # the router and the shared expert are whole on every rank, experts are its own only
        for whole in (layer.router.weight, layer.shared_experts.gate_up, layer.shared_experts.down):
            whole.normal_(std=0.2, generator=rng)
        layer.experts.gate_up.copy_(torch.randn(8, 48, 32, generator=rng)[mine] * 0.2)
        layer.experts.down.copy_(torch.randn(8, 32, 24, generator=rng)[mine] * 0.2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x_TD, target_TD = (t.chunk(group.world_size)[group.rank] for t in (x_TD, target_TD))  # this rank's tokens
    for step in range(2):
        optimizer.zero_grad()
        loss = (layer(x_TD) - target_TD).square().sum() / (64 * 32)  # this rank's share of the mean over all tokens
        loss.backward()
        sum_replicated_gradients(layer, transport)  # an expert's gradient is whole already
        optimizer.step()
        shares = transport.all_gather([round(loss.item() * 1e6)], "loss")
        if group.rank == 0:
            print(f"step {step}: loss {sum(share for (share,) in shares) / 1e6:.4f}")
