"""`weigh`: rows that came back to a rank, weighted and added up for each token; differentiable in rows and weights.

Legend: T tokens, D hidden, K rows a token can have, S rows in the order they were sent.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.backend import Backend, resolve_backend
from crossdock.comm.combine_kernel import weighted_sum_ref, weighted_sum_triton
from crossdock.comm.plan import Outgoing


def need_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def weigh(
    rows_SD: Tensor, weights_TK: Tensor | None, outgoing: Outgoing, plus_TD: Tensor | None, backend: Backend
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * (the row of (t, k)) (+ plus[t]) -> [T, D] in the rows' dtype.

    Weights of one where None. Added in the order of k, in float32, and rounded before plus[t] is added.
    """
    if not need_gradient(rows_SD, weights_TK, plus_TD):
        return weighted_sum(rows_SD, weights_TK, outgoing.position_TK, plus_TD, backend)
    y_TD: Tensor = _Weighed.apply(rows_SD, weights_TK, outgoing, backend)  # type: ignore[no-untyped-call]
    return y_TD if plus_TD is None else y_TD + plus_TD


def weighted_sum(
    rows_SD: Tensor, weights_TK: Tensor | None, position_TK: Tensor, plus_TD: Tensor | None, backend: Backend
) -> Tensor:
    """`weighted_sum_ref`, or its kernel: float64 has none."""
    on_triton = rows_SD.dtype != torch.float64 and resolve_backend(backend, rows_SD.device) == "triton"
    return (weighted_sum_triton if on_triton else weighted_sum_ref)(rows_SD, weights_TK, position_TK, plus_TD)


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, weights_TK: Tensor | None, outgoing: Outgoing, backend: Backend) -> Tensor:
        ctx.order_S, ctx.top_k, ctx.dtype = outgoing.order_S, outgoing.position_TK.shape[1], rows_SD.dtype
        ctx.save_for_backward(*() if weights_TK is None else (rows_SD, weights_TK))
        return weighted_sum(rows_SD, weights_TK, outgoing.position_TK, None, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        order_S, dtype = ctx.order_S, ctx.dtype
        dy_SD = dy_TD.index_select(0, order_S.div(ctx.top_k, rounding_mode="floor"))
        if not ctx.saved_tensors:
            return dy_SD, None, None, None
        rows_SD, weights_TK = ctx.saved_tensors
        wide = torch.promote_types(dtype, torch.float32)
        dy_SD = dy_SD.to(wide)
        weights_S = weights_TK.reshape(-1).index_select(0, order_S).to(wide)
        dweights_S = (dy_SD * rows_SD.to(wide)).sum(-1).to(weights_TK.dtype)
        dweights_TK = torch.zeros_like(weights_TK).reshape(-1).index_copy_(0, order_S, dweights_S)
        return (dy_SD * weights_S[:, None]).to(dtype), dweights_TK.view(weights_TK.shape), None, None
