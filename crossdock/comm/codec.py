"""`Codec`: another form in which rows travel. The exchange moves bytes and knows only how many; what they mean is the
codec's.

Legend: T tokens, R rows, D hidden, X bytes of a row on the wire.

Rows are encoded where they come from. Without gradients they are handed over as they came, so that experts that compute
in the codec's form take them as they are, or decoded on arrival, as the codec says. Only the way there is encoded: what
experts give is a sum's addend, and returns in the layer's dtype.
"""

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Rows [T, D] of a float dtype to uint8 [T, X] and back. A row's bytes depend on that row alone."""

    @property
    def decode_on_arrival(self) -> bool:
        """Whether rows are decoded before experts get them, where that is not needed for gradients anyway."""
        ...

    def row_bytes(self, hidden_size: int) -> int:
        """X. Raises ConfigError for a hidden size that this codec was not made for."""
        ...

    def encode(self, x_TD: Tensor) -> Tensor:
        """uint8 [T, X]."""
        ...

    def decode(self, rows_RX: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, D] in `dtype`, of rows that `encode` gave."""
        ...
