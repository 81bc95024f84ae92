"""What every test of the folder may want: outputs that are NaN until something writes them."""

from typing import Any

import pytest
import torch
from torch import Tensor


def _poisoned(tensor: Tensor) -> Tensor:
    if tensor.numel():
        tensor.view(torch.uint8).fill_(0xFF)  # NaN in every float dtype
    return tensor


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and Tensor.new_empty give NaN, so that an element no kernel writes is seen."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def empty_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        return _poisoned(empty(*args, **kwargs))

    def new_empty_of_nan(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _poisoned(new_empty(self, *args, **kwargs))

    monkeypatch.setattr(torch, "empty", empty_of_nan)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty_of_nan)
