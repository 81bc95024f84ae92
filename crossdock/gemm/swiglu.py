"""SwiGLU, the activation between an expert's two products: silu(gate) * up (Shazeer 2020, arXiv 2002.05202).

Gate and up come from one product whose weights stand one above the other, so they are two halves of a row:

    gate_up [R, 2F]     | gate: F columns | up: F columns |

Legend: R rows, F inner size, B strips of 128 columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.backend import Backend, resolve_backend
from crossdock.errors import ConfigError
from crossdock.gemm.checks import check_dtype, check_rank
from crossdock.gemm.quant import FLOATS
from crossdock.gemm.swiglu_kernel import swiglu_quantize_ref, swiglu_quantize_triton, swiglu_ref, swiglu_triton


def swiglu(gate_up_R2F: Tensor, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up: [R, 2F] -> [R, F] in the same dtype, computed in float32; differentiable.

    A row's bits do not depend on the other rows, on either backend.

    Takes bf16, fp16 and fp32, and fp64 (in its own precision) on the torch backend. Raises ConfigError for another
    rank or dtype, an odd number of columns, or a backend that cannot run here.
    """
    on_triton = resolve_backend(backend, gate_up_R2F.device) == "triton"
    _check(gate_up_R2F, FLOATS if on_triton else (*FLOATS, torch.float64))
    if not on_triton:
        return swiglu_ref(gate_up_R2F)
    if torch.is_grad_enabled() and gate_up_R2F.requires_grad:
        out_RF: Tensor = _Swiglu.apply(gate_up_R2F)  # type: ignore[no-untyped-call]
        return out_RF
    return swiglu_triton(gate_up_R2F)


def swiglu_quantize(gate_up_R2F: Tensor, *, pow2: bool = False, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """`swiglu`, then `quantize_rows` of its unrounded float32: [R, 2F] -> (codes [R, F] e4m3, scales [R, B] float32).

    Not differentiable. Raises ConfigError for another rank than 2, another dtype than bf16, fp16 or fp32, an odd
    number of columns, or a backend that cannot run here.
    """
    _check(gate_up_R2F, FLOATS)
    if resolve_backend(backend, gate_up_R2F.device) == "triton":
        return swiglu_quantize_triton(gate_up_R2F.detach(), pow2)
    return swiglu_quantize_ref(gate_up_R2F.detach(), pow2)


def _check(gate_up_R2F: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_rank("gate_up_R2F", gate_up_R2F, "R, 2F")
    check_dtype("gate_up_R2F", gate_up_R2F, dtypes, "what this backend computes")
    if gate_up_R2F.shape[1] % 2:
        raise ConfigError(f"gate_up_R2F must have an even number of columns, gate and up, found {gate_up_R2F.shape[1]}")


class _Swiglu(torch.autograd.Function):
    """The kernel forward; backward recomputes in torch from the saved input, which is all that is kept."""

    @staticmethod
    def forward(ctx: Any, gate_up_R2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_R2F)
        return swiglu_triton(gate_up_R2F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RF: Tensor) -> Tensor:
        (gate_up_R2F,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf_R2F = gate_up_R2F.detach().requires_grad_()
            dgate_up_R2F: Tensor = torch.autograd.grad(swiglu_ref(leaf_R2F), leaf_R2F, dout_RF)[0]
        return dgate_up_R2F
