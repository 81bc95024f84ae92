"""`Router` against the routers of transformers, and its gradients against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from crossdock.errors import ConfigError
from crossdock.routing import Router, select_experts, select_experts_ref

BACKENDS = ["torch", "triton"]
SCORES = ["sigmoid", "softmax", "sqrtsoftplus"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides and overflows aloud


def fill(router: Router, seed: int) -> Router:
    generator = torch.Generator().manual_seed(seed)
    router.weight.data.copy_(0.2 * torch.randn(router.weight.shape, generator=generator))
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.copy_(0.1 * torch.randn(len(router.weight), generator=generator))
    return router


def by_id(ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in the order of their ids: transformers leaves the order open."""
    ordered = ids_TK.sort(dim=1)
    return ordered.values, weights_TK.gather(1, ordered.indices)


def assert_agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    (ids_TK, weights_TK), (their_ids_TK, their_weights_TK) = by_id(*ours), by_id(*theirs)
    assert torch.equal(ids_TK, their_ids_TK)
    torch.testing.assert_close(weights_TK, their_weights_TK, rtol=2e-5, atol=0)  # the products add in another order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("renormalize", [True, False])
@torch.no_grad()
def test_agrees_with_deepseek_v3(backend: Any, renormalize: bool, device: torch.device) -> None:
    config = DeepseekV3Config(
        hidden_size=48,
        n_routed_experts=32,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        routed_scaling_factor=2.5,
        norm_topk_prob=renormalize,
    )
    router = Router(
        48,
        32,
        top_k=6,
        score="sigmoid",
        num_groups=8,
        top_groups=3,
        renormalize=renormalize,
        scale=2.5,
        selection_bias=True,
        backend=backend,
        device=device,
    )
    theirs = DeepseekV3TopkRouter(config).to(device)
    theirs.load_state_dict(fill(router, 0).state_dict())
    x_TD = torch.randn(20, 48, generator=torch.Generator().manual_seed(1)).to(device)
    routing = router(x_TD)
    _, weights_TK, ids_TK = theirs(x_TD)
    assert_agree((routing.expert_ids_TK, routing.weights_TK), (ids_TK, weights_TK))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("renormalize", [True, False])
@torch.no_grad()
def test_agrees_with_qwen3_moe(backend: Any, renormalize: bool, device: torch.device) -> None:
    config = Qwen3MoeConfig(hidden_size=48, num_experts=20, num_experts_per_tok=4, norm_topk_prob=renormalize)
    router = fill(Router(48, 20, top_k=4, renormalize=renormalize, backend=backend, device=device), 2)
    theirs = Qwen3MoeTopKRouter(config).to(device)
    theirs.load_state_dict(router.state_dict())
    x_TD = torch.randn(20, 48, generator=torch.Generator().manual_seed(3)).to(device)
    routing = router(x_TD)
    _, weights_TK, ids_TK = theirs(x_TD)
    assert_agree((routing.expert_ids_TK, routing.weights_TK), (ids_TK, weights_TK))


def weights_in_float64(logits_TE: Tensor, ids_TK: Tensor, score: str, renormalize: bool, scale: float) -> Tensor:
    """The weights as DeepSeek-V3's equations 12 to 16 give them, of choices already made."""
    if score == "softmax":
        scores_TE = torch.exp(logits_TE) / torch.exp(logits_TE).sum(1, keepdim=True)
    elif score == "sigmoid":
        scores_TE = 1 / (1 + torch.exp(-logits_TE))
    else:
        scores_TE = torch.log1p(torch.exp(logits_TE)).sqrt()
    picked_TK = scores_TE.gather(1, ids_TK)
    return scale * (picked_TK / picked_TK.sum(1, keepdim=True) if renormalize else picked_TK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_reach_rows_and_weight(backend: Any, score: Any, renormalize: bool, device: torch.device) -> None:
    options: dict[str, Any] = {"score": score, "renormalize": renormalize, "scale": 1.5}
    router = fill(Router(24, 10, top_k=3, **options, backend=backend, device=device), 4)
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.randn(7, 24, generator=generator).to(device).requires_grad_()
    grad_TK = torch.randn(7, 3, generator=generator).to(device)
    routing = router(x_TD)
    found = torch.autograd.grad(routing.weights_TK, (x_TD, router.weight), grad_TK)
    x_64, w_64 = x_TD.detach().double().requires_grad_(), router.weight.detach().double().requires_grad_()
    exact_TK = weights_in_float64(x_64 @ w_64.T, routing.expert_ids_TK, score, renormalize, 1.5)
    expected = torch.autograd.grad(exact_TK, (x_64, w_64), grad_TK.double())
    torch.testing.assert_close(routing.weights_TK.double(), exact_TK, rtol=1e-5, atol=0)
    for gradient, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_gradients_stay_finite(score: Any) -> None:
    """NaN, infinities, scores that underflow, and rows without an expert."""
    nan, inf = float("nan"), float("inf")
    rows = [[nan, 1.0, -inf, 2.0], [nan] * 4, [-inf] * 4, [nan, -inf, nan, inf], [-900.0, -800.0, 0.0, 1.0]]
    for select in (select_experts, select_experts_ref):
        logits_TE = torch.tensor(rows, requires_grad=True)
        select(logits_TE, top_k=3, score=score).weights_TK.square().sum().backward()
        assert logits_TE.grad is not None and logits_TE.grad.isfinite().all()
        assert logits_TE.grad[1].abs().sum() == 0 and logits_TE.grad[0, 3] != 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_do_not_touch_the_weight(backend: Any, device: torch.device) -> None:
    router = fill(Router(16, 8, top_k=2, score="sigmoid", backend=backend, device=device), 6)
    x_TD = torch.randn(4, 16, generator=torch.Generator().manual_seed(7)).to(device)
    grad_TK = torch.tensor([[1.0, -2.0]], device=device).expand(4, 2)
    (expected_ED,) = torch.autograd.grad(router(x_TD[:3]).weights_TK, router.weight, grad_TK[:3])
    x_TD[3] = float("nan")
    valid_T = torch.tensor([True, True, True, False], device=device)
    routing = router(x_TD, valid_T)
    assert routing.expert_ids_TK[3].tolist() == [-1, -1]
    (found_ED,) = torch.autograd.grad(routing.weights_TK, router.weight, grad_TK)
    torch.testing.assert_close(found_ED, expected_ED)


def test_decode_and_prefill_agree() -> None:
    """A token alone is routed as it is among others, bit for bit, in training and in inference."""
    router = fill(Router(64, 16, top_k=4, score="sigmoid", num_groups=4, top_groups=2, selection_bias=True), 8)
    x_TD = torch.randn(33, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    whole = router(x_TD)
    assert whole.weights_TK.requires_grad
    with torch.inference_mode():
        for row in range(33):
            alone = router(x_TD[row : row + 1])
            assert torch.equal(alone.expert_ids_TK[0], whole.expert_ids_TK[row])
            assert torch.equal(alone.weights_TK[0], whole.weights_TK[row])


def test_state_and_loads() -> None:
    router = Router(16, 8, top_k=2, selection_bias=True, dtype=torch.bfloat16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in router.state_dict().items()} == {
        "weight": ((8, 16), torch.bfloat16),
        "e_score_correction_bias": ((8,), torch.float32),
    }
    load_E = torch.zeros(8, dtype=torch.int64)
    for _ in range(2):
        router(torch.ones(3, 16), load_E=load_E)
    assert load_E.tolist() == [6, 6, 0, 0, 0, 0, 0, 0]
    plain = Router(16, 8, top_k=2)
    assert plain.e_score_correction_bias is None and list(plain.state_dict()) == ["weight"]
    with pytest.raises(ConfigError, match="top_groups"):
        Router(16, 8, top_k=2, num_groups=4, top_groups=5)
