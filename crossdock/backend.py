"""Which implementation of an operator runs: chosen once, by the tensor's device, and said in one place."""

from typing import Literal

import torch

from crossdock._triton import HAS_TRITON, interpreting
from crossdock.errors import ConfigError

Backend = Literal["auto", "torch", "triton"]


def resolve_backend(backend: Backend, device: torch.device) -> Literal["torch", "triton"]:
    """`auto` is Triton on a GPU that has it and torch elsewhere; `triton` on a CPU tensor needs the interpreter.

    Raises ConfigError where the backend asked for cannot run on `device`.
    """
    if backend == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if backend == "torch":
        return "torch"
    if backend != "triton":
        raise ConfigError(f"backend must be 'auto', 'torch' or 'triton', found {backend!r}")
    if not HAS_TRITON:
        raise ConfigError("backend='triton' was asked for, but the triton package is not installed")
    if device.type == "cpu" and not interpreting():
        raise ConfigError("backend='triton' on a CPU tensor needs TRITON_INTERPRET=1 set before crossdock is imported")
    return "triton"
