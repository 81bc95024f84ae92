"""Checkpoint names that both model families share: SwiGLU projections and routed experts, in either layout.

Legend: e logical expert, L slots on this rank, F inner size.

Hugging Face stores gate and up projections apart and, for experts, either one tensor an expert or all of a layer's
fused; here gate and up stand in one weight, gate rows first:

    experts.{e}.gate_proj.weight [F, D] -> gate_up[slot, :F]        experts.gate_up_proj [E, 2F, D] -> [e, :F] of it
    experts.{e}.up_proj.weight   [F, D] -> gate_up[slot, F:]                                           [e, F:] of it
    experts.{e}.down_proj.weight [D, F] -> down[slot]               experts.down_proj [E, D, F]     -> [e] of it
"""

from collections.abc import Iterator

from torch import Tensor

from crossdock.models.loader import Source, Target
from crossdock.moe import Fp8Experts, MoELayer, PackedExperts, SwigluMLP


def whole(into: Tensor, *names: str) -> Target:
    """A tensor that every rank holds whole, from the first of `names` that the checkpoint has."""
    return Target(into.detach(), tuple(Source(name) for name in names))


def swiglu(mlp: SwigluMLP, prefix: str) -> Iterator[Target]:
    """gate_proj, up_proj and down_proj of an MLP that is whole on every rank."""
    size_F = mlp.down.shape[1]
    yield Target(mlp.gate_up.detach()[:size_F], (Source(f"{prefix}gate_proj.weight"),))
    yield Target(mlp.gate_up.detach()[size_F:], (Source(f"{prefix}up_proj.weight"),))
    yield Target(mlp.down.detach(), (Source(f"{prefix}down_proj.weight"),))


def experts(layer: MoELayer, prefix: str) -> Iterator[Target]:
    """The experts in this rank's slots, from per-expert tensors or from fused ones."""
    held = layer.experts
    assert not isinstance(held, PackedExperts), "experts are packed after they are loaded"
    size_F = held.down.shape[-1]
    halves = {"gate_proj": slice(0, size_F), "up_proj": slice(size_F, 2 * size_F)}
    rank = layer.dispatcher.transport.rank
    for slot, expert in enumerate(layer.placement.experts_of_rank(rank)):
        if expert < 0:
            continue
        parts: list[tuple[str, Tensor, str, tuple[int | slice, ...]]] = [
            (name, held.gate_up.detach()[slot, rows], "gate_up_proj", (expert, rows)) for name, rows in halves.items()
        ]
        parts.append(("down_proj", held.down.detach()[slot], "down_proj", (expert,)))
        for name, into, fused, index in parts:
            sources = (Source(f"{prefix}{expert}.{name}.weight"), Source(f"{prefix}{fused}", index))
            scale = None
            if isinstance(held, Fp8Experts):
                scale = held.down_scale[slot]
                if name != "down_proj":
                    blocks = held.gate_up_scale.shape[1] // 2
                    scale = (
                        held.gate_up_scale[slot, :blocks] if name == "gate_proj" else held.gate_up_scale[slot, blocks:]
                    )
            yield Target(into, sources, scale_into=scale)
