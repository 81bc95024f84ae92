"""Without a GPU, kernels run in Triton's interpreter, which must be chosen before crossdock defines them.

The interpreter multiplies tiles by numpy's BLAS. OpenBLAS's kernels for CPUs with AVX2 and no more give a row of a tile
other bits in another place of it; those chosen here, for CPUs before these, do not.
"""

import os
import platform

if platform.machine() in ("x86_64", "AMD64"):
    os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"  # read once, by the first import of numpy, which is torch's

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tests are small, and several ranks' threads in one process would wait for one another

from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.launch import Ranks  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _poisoning(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`empty`, filled with what no kernel writes: NaN in every float dtype, far below zero in every signed integer."""

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.numel():
            tensor.view(torch.uint8).fill_(0xFF if tensor.is_floating_point() else 0x85)
        return tensor

    return poisoned


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like and Tensor.new_empty are poisoned, so that an element no kernel writes is seen."""
    monkeypatch.setattr(torch, "empty", _poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def ranks_of_two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def ranks_of_four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks
