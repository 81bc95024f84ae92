"""crossdock: a Mixture-of-Experts expert-parallel runtime for PyTorch.

    group = crossdock.init()                                    # torchrun's ranks, or a group of one
    transport = crossdock.make_transport(group)
    layer = crossdock.MoELayer(config, transport, dtype=torch.bfloat16, device=group.device)
    y_TD = layer(x_TD)                                          # a collective: every rank calls it

Importing it touches no GPU, reads no environment and starts nothing. Names are imported when they are first used, so
that the command line says what is wrong with its options before torch has loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossdock.comm import LocalWorld, make_transport
    from crossdock.errors import CrossdockError, RankFailure
    from crossdock.gemm import QuantSpec
    from crossdock.models.generate import generate
    from crossdock.models.registry import load_model
    from crossdock.moe import ExchangeConfig, MoEConfig, MoELayer, go_on
    from crossdock.parallel import EPGroup, ExpertPlacement, Topology, init, lost_ranks, rebalance, recover

__version__ = "0.1.0"

__all__ = [
    "CrossdockError",
    "EPGroup",
    "ExchangeConfig",
    "ExpertPlacement",
    "LocalWorld",
    "MoEConfig",
    "MoELayer",
    "QuantSpec",
    "RankFailure",
    "Topology",
    "generate",
    "go_on",
    "init",
    "load_model",
    "lost_ranks",
    "make_transport",
    "rebalance",
    "recover",
]

_HOMES = {
    "comm": ("LocalWorld", "make_transport"),
    "errors": ("CrossdockError", "RankFailure"),
    "gemm": ("QuantSpec",),
    "models.generate": ("generate",),
    "models.registry": ("load_model",),
    "moe": ("ExchangeConfig", "MoEConfig", "MoELayer", "go_on"),
    "parallel": ("EPGroup", "ExpertPlacement", "Topology", "init", "lost_ranks", "rebalance", "recover"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"crossdock.{home}"), name)
            return value
    raise AttributeError(f"module 'crossdock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
