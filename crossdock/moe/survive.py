"""`go_on`: a model's MoE layers over the ranks that a failure has left.

    old, group = group, recover(group)
    go_on(model, make_transport(group), lost_ranks(old, group))

Weights stay where they are. An expert of a lost rank is computed by its replicas elsewhere, to the bits it had, so the
results are those of a run that had never known the lost ranks. That needs a placement with replicas of every expert.
Rejected: slots of lost ranks that are masked in each exchange: every step would pay for a case that a smaller placement
covers.
"""

from collections.abc import Sequence

from torch import nn

from crossdock.comm.transport import Transport
from crossdock.moe.config import ExchangeConfig
from crossdock.moe.layer import MoELayer, as_before_on_errors


def go_on(model: nn.Module, transport: Transport, lost: Sequence[int], exchange: ExchangeConfig | None = None) -> None:
    """Moves every MoE layer of `model` to `transport`, that of the ranks left; a collective of them.

    `lost` are the ranks that are gone, as the layers' placements number them. Raises RankFailure, naming the experts,
    where one has no replica left, and ConfigError for `lost` ranks that there were not. Whatever is raised, another
    rank's failure on the way included, all layers of the model are then as they were. `exchange` says how rows travel
    from now on, as before without it: a node that has lost a rank is no place for hierarchy "node".
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    placements = [layer.placement.without(lost) for layer in layers]
    with as_before_on_errors(layers):
        for layer, placement in zip(layers, placements, strict=True):
            layer.continue_on(transport, placement, exchange)
