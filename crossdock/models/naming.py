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

from crossdock.gemm import BLOCK
from crossdock.models.blocks import Fp8Linear, Linear
from crossdock.models.loader import Source, Target
from crossdock.moe import Fp8Experts, MoELayer, PackedExperts, SwigluMLP
from crossdock.moe.mlp import Fp8MLP


def whole(into: Tensor, *names: str) -> Target:
    """A tensor that every rank holds whole, from the first of `names` that the checkpoint has."""
    return Target(into.detach(), tuple(Source(name) for name in names))


ALL = slice(0, None)


def projection(part: Linear | Fp8Linear, name: str, rows: slice = ALL) -> Target:
    """The weight of a projection, or those rows of it, which begin where a block does; in FP8 its scales too."""
    return _rows(part.weight, part.scale if isinstance(part, Fp8Linear) else None, name, rows)


def _rows(weight: Tensor, scale: Tensor | None, name: str, rows: slice = ALL) -> Target:
    if scale is not None:
        scale = scale[rows.start // BLOCK : None if rows.stop is None else rows.stop // BLOCK]
    return Target(weight.detach()[rows], (Source(name),), scale)


def swiglu(mlp: SwigluMLP | Fp8MLP, prefix: str) -> Iterator[Target]:
    """gate_proj, up_proj and down_proj of an MLP that is whole on every rank."""
    size_F = mlp.down.shape[1]
    scales = (mlp.gate_up_scale, mlp.down_scale) if isinstance(mlp, Fp8MLP) else (None, None)
    yield _rows(mlp.gate_up, scales[0], f"{prefix}gate_proj.weight", slice(0, size_F))
    yield _rows(mlp.gate_up, scales[0], f"{prefix}up_proj.weight", slice(size_F, None))
    yield _rows(mlp.down, scales[1], f"{prefix}down_proj.weight")


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
