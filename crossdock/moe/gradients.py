"""Training over ranks: what several ranks hold gets the sum of their gradients, and they all the same bits.

Legend: W ranks, N values of all replicated gradients together, S replicas sent, R replicas received, V values of an
expert.

An expert's gradient is whole where it lives alone, because the backward of the exchange brings it every row. Each
replica of an expert has seen its own rows only, and routers, shared experts and whatever else a model replicates this
rank's tokens only: left alone they would drift apart. Sums are taken in the order of ranks or slots, each at one rank,
which gives it to the others.
"""

import zlib

import torch
from torch import Tensor, nn

from crossdock.comm.agreement import tell_apart
from crossdock.comm.transport import Transport
from crossdock.errors import ConfigError, PlanMismatch
from crossdock.moe.experts import Experts
from crossdock.moe.layer import MoELayer
from crossdock.parallel import ExpertPlacement


def sum_replicated_gradients(model: nn.Module, transport: Transport) -> None:
    """Replaces the gradient of every parameter outside `Experts` by its sum over the ranks, and that of each expert
    with several replicas by the sum over these; a collective.

    A parameter without a gradient on this rank counts as zero. Sums are float32. Call it between backward and the
    optimiser's step; scale the loss by the number of tokens of all ranks beforehand to get a mean. Raises ConfigError
    naming a layer whose experts are spread over another number of ranks, and PlanMismatch before anything moves where a
    rank has others to sum up, such as parameters that are frozen elsewhere.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]
    for name, layer in layers:
        if layer.placement.world_size != transport.world_size:
            raise ConfigError(f"the experts of layer {name!r} stand on {layer.placement.world_size} ranks, "
                              f"but gradients are to be summed over {transport.world_size}")  # fmt: skip
    sharded = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    replicated = [p for p in trained.values() if id(p) not in sharded]
    _check_alike(transport, trained)
    for name, layer in layers:
        _sum_replicas(layer, transport, f"sum of replicas' gradients in layer {name}")
    if transport.world_size == 1 or not replicated:
        return
    flat_N = torch.cat([_gradient(p).reshape(-1).float() for p in replicated])
    total_N = _sum(flat_N, transport)
    for parameter, part in zip(replicated, torch.split(total_N, [p.numel() for p in replicated]), strict=True):
        parameter.grad = part.view(parameter.shape).to(parameter.dtype)


def _check_alike(transport: Transport, trained: dict[str, nn.Parameter]) -> None:
    """Raises PlanMismatch where ranks have other parameters to sum up."""
    mine = [len(trained), zlib.crc32(repr([(name, tuple(p.shape)) for name, p in trained.items()]).encode())]
    counts = transport.all_gather(mine, "start of sums of gradients")
    found = tell_apart(counts, transport)
    if found is not None:
        odd, other, expected = found
        who = f"rank {transport.members[transport.rank]}: sums of gradients: rank {transport.members[odd]}"
        what = f"{counts[odd][0]} parameters, expected the same {counts[other][0]} {expected}"
        raise PlanMismatch(f"{who} trains {what}, of the same shapes")


def _trained(layer: MoELayer) -> list[nn.Parameter]:
    return [weight for weight in layer.experts.parameters() if weight.requires_grad]


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


def _sum_replicas(layer: MoELayer, transport: Transport, phase: str) -> None:
    """Replicas of one expert all get the sum of their gradients, added up in ascending order of their slots."""
    placement, rank = layer.placement, transport.rank
    weights = _trained(layer)
    home = _homes(placement)
    if not weights or not home:
        return
    own = placement.slots_of_rank(rank)
    leaving = sorted((slot for slot in own if slot in home), key=lambda slot: (home[slot], slot))
    arriving = sorted(slot for slot in home if home[slot] == rank)  # which is by the rank that sends it, too
    sends = [sum(home[slot] == peer for slot in leaving) for peer in range(transport.world_size)]
    receives = [sum(slot in placement.slots_of_rank(peer) for slot in arriving) for peer in range(transport.world_size)]
    at_S = torch.tensor([slot - own.start for slot in leaving], dtype=torch.int64, device=weights[0].device)
    sent_SV = torch.cat([_gradient(weight).index_select(0, at_S).flatten(1).float() for weight in weights], 1)
    rows_RV = transport.all_to_all_rows(sent_SV, sends, receives, phase).wait()
    totals: dict[int, Tensor] = {}
    for slot, row_V in zip(arriving, rows_RV, strict=True):
        expert = placement.physical_to_logical[slot]
        totals[expert] = totals[expert] + row_V if expert in totals else row_V
    sums = [totals[placement.physical_to_logical[slot]] for slot in arriving]
    sums_RV = torch.stack(sums) if sums else rows_RV
    back_SV = transport.all_to_all_rows(sums_RV, receives, sends, phase).wait()
    widths = [weight[0].numel() for weight in weights]
    for weight, part_SV in zip(weights, torch.split(back_SV, widths, 1), strict=True):
        gradient, part = _gradient(weight), part_SV.reshape(-1, *weight.shape[1:]).to(weight.dtype)
        weight.grad = gradient.index_copy(0, at_S, part)


def _homes(placement: ExpertPlacement) -> dict[int, int]:
    """For each slot of an expert that has several: the rank at which these are added up, another for each expert."""
    slots: dict[int, list[int]] = {}
    for slot, expert in enumerate(placement.physical_to_logical):
        if expert >= 0:
            slots.setdefault(expert, []).append(slot)
    return {
        slot: held[expert % len(held)] // placement.slots_per_rank
        for expert, held in slots.items()
        if len(held) > 1
        for slot in held
    }
