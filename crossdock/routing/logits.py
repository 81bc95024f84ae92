"""`router_gemm`: the router's product, in float32 whatever the model's dtype, each row independent of its company.

Legend: T tokens on this rank, D hidden, E logical experts.
"""

from torch import Tensor

from crossdock.backend import Backend, resolve_backend
from crossdock.linear import linear
from crossdock.routing.checks import check_product


def router_gemm(x_TD: Tensor, w_ED: Tensor, backend: Backend = "auto") -> Tensor:
    """x @ w^T in float32: [T, D] x [E, D] -> [T, E] float32, differentiable; a row's bits do not depend on T.

    x and w are float32, bfloat16 or float16, each of its own. Raises ConfigError where they do not fit together.
    """
    check_product(x_TD, w_ED)
    resolve_backend(backend, x_TD.device)
    return router_gemm_ref(x_TD, w_ED)


def router_gemm_ref(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """`router_gemm` in torch operations: the specification, and the path for tensors on a CPU."""
    return linear(x_TD.float(), w_ED.float())
