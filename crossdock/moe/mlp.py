"""A SwiGLU MLP that every rank holds whole: shared experts here, dense layers in the models.

Legend: T tokens, D hidden, F inner size.
"""

import torch
from torch import Tensor, nn

from crossdock.backend import Backend
from crossdock.gemm import swiglu
from crossdock.linear import linear, pack


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one weight [2F, D] (gate rows first)."""

    def __init__(
        self, hidden_size: int, inner_size: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.gate_up = nn.Parameter(torch.zeros(2 * inner_size, hidden_size, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.zeros(hidden_size, inner_size, dtype=dtype, device=device))

    def pack(self) -> None:
        """Lays the weights out for inference on this device once and for all; the bits stay the same."""
        for name in ("gate_up", "down"):
            setattr(self, name, nn.Parameter(pack(getattr(self, name).data), requires_grad=False))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return linear(swiglu(linear(x_TD, self.gate_up), backend=self.backend), self.down)


class GatedMLP(SwigluMLP):
    """The same times sigmoid(x . gate) per token: Qwen2-MoE's shared expert (`shared_expert_gate`)."""

    def __init__(
        self, hidden_size: int, inner_size: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
    ) -> None:
        super().__init__(hidden_size, inner_size, dtype, device, backend)
        self.gate = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=device))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        gate_T1 = torch.sigmoid(linear(x_TD, self.gate).double())  # by float64: see crossdock.linear
        return gate_T1.to(x_TD.dtype) * super().forward(x_TD)
