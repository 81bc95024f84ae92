"""SwiGLU, the activation between an expert's two products.

Legend: R rows, F inner size, B blocks of 128 columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.backend import Backend
from crossdock.gemm.quant import quantize_rows


def swiglu(gate_up_R2F: Tensor, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up -> [R, F]."""
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
    if gate_up_R2F.dtype in (torch.float32, torch.float64):
        return F.silu(gate_RF) * up_RF
    return (F.silu(gate_RF.float()) * up_RF.float()).to(gate_up_R2F.dtype)


def swiglu_quantize(
    gate_up_R2F: Tensor, *, pow2: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """swiglu, then quantize_rows, from the unrounded fp32 product."""
    gate_RF, up_RF = gate_up_R2F.float().chunk(2, dim=-1)
    return quantize_rows(F.silu(gate_RF) * up_RF, pow2=pow2, backend=backend)
