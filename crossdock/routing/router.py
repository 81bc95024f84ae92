"""`Router`: a layer's router weight, its selection bias and the options that turn rows into a `Routing`.

On the Triton backend, where no gradient is asked for, routing is two launches: the product writes partial sums, and the
selection adds them, scores, selects, finds slots and counts load. With a gradient the logits are needed too, so that
they are added up in a launch between. The bits are the same.

Legend: T tokens on this rank, D hidden, E logical experts, K experts per token, X most replicas of any expert.
"""

import torch
from torch import Tensor, nn

from crossdock.backend import Backend, resolve_backend
from crossdock.routing.checks import PlacementTables, check_options, check_product
from crossdock.routing.logits import router_logits, router_partials
from crossdock.routing.rule import Routing, Rule, Score
from crossdock.routing.select import route
from crossdock.routing.select_kernel import select_partials


class Router(nn.Module):
    """Router of one MoE layer; knows nothing of ranks.

    `weight`: parameter [E, D] in `dtype`, zero until loaded or initialised. `e_score_correction_bias`: float32 buffer
    [E], zero until loaded or balanced, where `selection_bias`; None otherwise. The other options are those of
    `select_experts`, under the checkpoint's config fields named there.

    Raises ConfigError where the options can not describe a router.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        score: Score = "softmax",
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        selection_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.rule = Rule(num_experts, top_k, score, num_groups, top_groups, renormalize, scale)
        self.backend = backend
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=dtype, device=device))
        bias_E = torch.zeros(num_experts, dtype=torch.float32, device=device) if selection_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(
        self,
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        load_E: Tensor | None = None,
        placement_tables: PlacementTables | None = None,
    ) -> Routing:
        """Routes rows [T, D] of any float type; the gradient reaches x and `weight` through `weights_TK`.

        valid_T: bool, False for rows that shall have no expert. load_E: int64, the choices of each expert are added.
        placement_tables: (logical_to_physical_EX, replica_count_E), int64: asks for `slot_ids_TK`.

        Raises ConfigError, before any launch, for tensors of another shape, dtype or device.
        """
        check_product(x_TD, self.weight)
        options = self.e_score_correction_bias, valid_T, placement_tables, load_E
        check_options(len(x_TD), self.rule.num_experts, x_TD.device, *options)
        backend = resolve_backend(self.backend, x_TD.device)
        has_gradient = torch.is_grad_enabled() and (x_TD.requires_grad or self.weight.requires_grad)
        if backend == "triton" and not has_gradient:
            return Routing(*select_partials(router_partials(x_TD, self.weight), self.rule, *options))
        if valid_T is not None and has_gradient:
            x_TD = x_TD.masked_fill(~valid_T[:, None], 0.0)  # or a NaN there would reach the gradient of `weight`
        return route(router_logits(x_TD, self.weight, backend), self.rule, *options, backend=backend)
