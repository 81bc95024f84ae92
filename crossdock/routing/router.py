"""`Router`: a layer's router weight, its selection bias and the options that turn rows into a `Routing`.

Legend: T tokens on this rank, D hidden, E logical experts, K experts per token.
"""

import torch
from torch import Tensor, nn

from crossdock.backend import Backend
from crossdock.routing.logits import router_gemm
from crossdock.routing.rule import Routing, Rule, Score
from crossdock.routing.select import select_experts


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

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, load_E: Tensor | None = None) -> Routing:
        """Routes rows [T, D] of any float type; the gradient reaches x and `weight` through `weights_TK`.

        valid_T: bool, False for rows that shall have no expert. load_E: int64, the choices of each expert are added.
        """
        if valid_T is not None and torch.is_grad_enabled():
            x_TD = x_TD.masked_fill(~valid_T[:, None], 0.0)  # or a NaN there would reach the gradient of `weight`
        rule = self.rule
        return select_experts(
            router_gemm(x_TD, self.weight, self.backend),
            top_k=rule.top_k,
            score=rule.score,
            bias_E=self.e_score_correction_bias,
            num_groups=rule.num_groups,
            top_groups=rule.top_groups,
            renormalize=rule.renormalize,
            scale=rule.scale,
            valid_T=valid_T,
            load_E=load_E,
            backend=self.backend,
        )
