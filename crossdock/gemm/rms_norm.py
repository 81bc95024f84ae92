"""RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467), with the residual sum before it and the quantisation after it.

One launch on the triton backend for what a transformer's block begins with:

    y_TD, residual_TD = rms_norm(attention_out_TD, weight_D, eps, residual_TD)
    normed = rms_norm_quantize(x_TD, weight_D, eps, residual_TD, with_rows=True)
    logits_TE = router(normed.rows_TD)                              a router reads what is not quantised
    out_TN = linear_fp8((normed.q_TD, normed.scale_TB), wq_NK, wscale_BB)

Legend: T tokens, D hidden size, B blocks of 128.
"""

from typing import NamedTuple, overload

import torch
from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.gemm.checks import check_dtype, check_rank, check_same_device, check_shape
from crossdock.gemm.quant import FLOATS
from crossdock.gemm.rms_norm_kernel import Outputs, rms_norm_ref, rms_norm_triton


class QuantizedNorm(NamedTuple):
    """Rows after the norm as codes [T, D] e4m3 with scales [T, ceil(D / 128)] float32, and what else was asked for.

    residual_TD  the sum that was normalised, where a residual was given
    rows_TD      what was quantised, in the dtype of what came in, where `with_rows`
    """

    q_TD: Tensor
    scale_TB: Tensor
    residual_TD: Tensor | None
    rows_TD: Tensor | None


@overload
def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: None = None, backend: Backend = ...
) -> Tensor: ...
@overload
def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor, backend: Backend = ...
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None = None, backend: Backend = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight for every row [T, D], in x's dtype; with a residual that of x + residual.

    x_TD         [T, D] bf16, fp16 or fp32; rows may be any stride apart
    weight_D     [D] in x's dtype
    residual_TD  [T, D] in x's dtype, or None: then -> (the norm, x + residual), the sum rounded to x's dtype first

    The mean and what follows are float32, rounded once. A row's bits do not depend on the other rows. Differentiable:
    where a gradient is wanted, torch computes it. Raises ConfigError where ranks, shapes, dtypes or devices do not fit
    one another, or for a backend that cannot run here.
    """
    _check(x_TD, weight_D, residual_TD)
    wanted = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_TD, weight_D, residual_TD)
    )
    launch = rms_norm_triton if not wanted and resolve_backend(backend, x_TD.device) == "triton" else rms_norm_ref
    rows_TD, sum_TD, *_ = launch(x_TD, weight_D, eps, residual_TD, quantize=False, rows=True, pow2=False)
    assert rows_TD is not None
    return rows_TD if sum_TD is None else (rows_TD, sum_TD)


def rms_norm_quantize(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None = None,
    *,
    pow2: bool = False,
    with_rows: bool = False,
    backend: Backend = "auto",
) -> QuantizedNorm:
    """`rms_norm`, then `quantize_rows` of what it gives; `with_rows` keeps that too, for a router that reads it.

    `pow2` rounds scales up to powers of two. Equal to the bit to the two functions on the same backend. Not
    differentiable. Raises ConfigError as `rms_norm` does.
    """
    _check(x_TD, weight_D, residual_TD)
    launch = rms_norm_triton if resolve_backend(backend, x_TD.device) == "triton" else rms_norm_ref
    residual_TD = None if residual_TD is None else residual_TD.detach()
    out: Outputs = launch(x_TD.detach(), weight_D.detach(), eps, residual_TD, quantize=True, rows=with_rows, pow2=pow2)
    rows_TD, sum_TD, q_TD, scale_TB = out
    assert q_TD is not None and scale_TB is not None
    return QuantizedNorm(q_TD, scale_TB, sum_TD, rows_TD)


def _check(x_TD: Tensor, weight_D: Tensor, residual_TD: Tensor | None) -> None:
    check_rank("x_TD", x_TD, "T, D")
    check_dtype("x_TD", x_TD, FLOATS, "what can be normalised")
    check_dtype("weight_D", weight_D, (x_TD.dtype,), "the dtype of x_TD")
    check_shape("weight_D", weight_D, (x_TD.shape[1],), "one weight for each column of x_TD")
    check_same_device("x_TD", x_TD, ("weight_D", weight_D))
    if residual_TD is not None:
        check_dtype("residual_TD", residual_TD, (x_TD.dtype,), "the dtype of x_TD")
        check_shape("residual_TD", residual_TD, tuple(x_TD.shape), "the shape of x_TD")
        check_same_device("x_TD", x_TD, ("residual_TD", residual_TD))
