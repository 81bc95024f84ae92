"""Training over ranks: what every rank holds whole gets the sum of all ranks' gradients; experts already have theirs.

Legend: W ranks, N values of all replicated gradients together.

An expert's gradient is whole where it lives, because the backward of the exchange brings it every row. Routers, shared
experts and whatever else a model replicates have seen this rank's tokens only. The sum is taken in rank order, each
rank summing one share of it, so that all ranks hold the same bits.
"""

import torch
from torch import Tensor, nn

from crossdock.comm.transport import Transport
from crossdock.moe.experts import Experts


def sum_replicated_gradients(model: nn.Module, transport: Transport) -> None:
    """Replaces the gradient of every parameter outside `Experts` by its sum over the ranks; a collective.

    A parameter without a gradient on this rank counts as zero. Sums are float32. Call it between backward and the
    optimiser's step; scale the loss by the number of tokens of all ranks beforehand to get a mean.
    """
    if transport.world_size == 1:
        return
    sharded = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    replicated = [p for p in model.parameters() if p.requires_grad and id(p) not in sharded]
    if not replicated:
        return
    flat_N = torch.cat([_gradient(p).reshape(-1).float() for p in replicated])
    total_N = _sum(flat_N, transport)
    for parameter, part in zip(replicated, torch.split(total_N, [p.numel() for p in replicated]), strict=True):
        parameter.grad = part.view(parameter.shape).to(parameter.dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _sum(flat_N: Tensor, transport: Transport) -> Tensor:
    """Each rank sums its share of the values over the ranks, then gives it to all."""
    world_size, count = transport.world_size, flat_N.shape[0]
    ones = [1] * world_size
    shares_WS = torch.nn.functional.pad(flat_N, (0, -count % world_size)).view(world_size, -1)
    mine_WS = transport.all_to_all_rows(shares_WS, ones, ones, "reduce-scatter of gradients").wait()
    total_S, *others = mine_WS.unbind(0)
    for share_S in others:
        total_S = total_S + share_S
    everyone = total_S.expand(world_size, -1)
    return transport.all_to_all_rows(everyone, ones, ones, "all-gather of gradients").wait().reshape(-1)[:count]
