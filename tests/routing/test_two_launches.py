"""Routing without gradient on the Triton backend: two launches, nothing besides, and the bits of the path of three."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.cli.bench.launches import record_launches
from crossdock.errors import ConfigError
from crossdock.routing import Router, Routing, logits, router_gemm, select_experts, select_kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides and overflows aloud

EXPERTS, TOP_K, HIDDEN = 20, 3, 1100  # five chunks, the last not whole


def make_router(weight: torch.dtype, device: torch.device, **options: Any) -> Router:
    router = Router(HIDDEN, EXPERTS, top_k=TOP_K, dtype=weight, device=device, backend="triton", **options)
    generator = torch.Generator().manual_seed(0)
    router.weight.data.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator) / HIDDEN**0.5)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.copy_(0.1 * torch.randn(EXPERTS, generator=generator))
    return router


def rows_of(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


def extras(rows: int, device: torch.device) -> dict[str, Any]:
    slots_EX = torch.arange(2 * EXPERTS, device=device).view(EXPERTS, 2)
    return {
        "valid_T": torch.arange(rows, device=device) % 4 != 2,
        "placement_tables": (slots_EX, 1 + torch.arange(EXPERTS, device=device) % 2),
        "load_E": torch.zeros(EXPERTS, dtype=torch.int64, device=device),
    }


def in_three(router: Router, x_TD: Tensor, **options: Any) -> Routing:
    rule = router.rule
    return select_experts(
        router_gemm(x_TD, router.weight, "triton"),
        top_k=rule.top_k,
        score=rule.score,
        bias_E=router.e_score_correction_bias,
        num_groups=rule.num_groups,
        top_groups=rule.top_groups,
        renormalize=rule.renormalize,
        scale=rule.scale,
        backend="triton",
        **options,
    )


def assert_same_bits(found: Routing, expected: Routing) -> None:
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(found.weights_TK, expected.weights_TK)
    assert found.slot_ids_TK is not None and expected.slot_ids_TK is not None
    assert torch.equal(found.slot_ids_TK, expected.slot_ids_TK)


DEEPSEEK = {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "scale": 2.5, "selection_bias": True}


@pytest.mark.parametrize(("x", "w"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize(("rows", "is_many"), [(1, False), (5, False), (66, True)])
@torch.no_grad()
def test_two_launches_and_nothing_else(
    x: str, w: str, rows: int, is_many: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, D split; and as many rows are, D whole and several rows a program, whose limits are set low here."""
    monkeypatch.setattr(logits, "SPLIT_BELOW", 2)  # tiles: 66 rows make two
    monkeypatch.setattr(select_kernel, "MANY_ROWS", 64)
    router = make_router(getattr(torch, w), device, **DEEPSEEK)
    x_TD = rows_of(rows, getattr(torch, x), device)
    options, again = extras(rows, device), extras(rows, device)
    with record_launches(device) as names:
        found = router(x_TD, **options)
    assert names == ["router_gemm_kernel", "select_kernel"]
    with record_launches(device) as names:
        expected = in_three(router, x_TD, **again)
    assert names == ["router_gemm_kernel", *([] if is_many else ["sum_chunks_kernel"]), "select_kernel"]
    assert_same_bits(found, expected)
    assert torch.equal(options["load_E"], again["load_E"])
    assert torch.equal(options["load_E"].sum(), TOP_K * options["valid_T"].sum())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rows", [1, 67])
@torch.no_grad()
def test_every_output_is_written(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "SPLIT_BELOW", 2)
    monkeypatch.setattr(select_kernel, "MANY_ROWS", 64)
    router, x_TD, options = (
        make_router(torch.float32, device),
        rows_of(rows, torch.bfloat16, device),
        extras(rows, device),
    )
    first, again = router(x_TD, **options), router(x_TD, **options)
    assert_same_bits(first, again)
    is_none_TK = first.expert_ids_TK < 0
    assert torch.equal(is_none_TK, ~options["valid_T"][:, None].expand(-1, TOP_K))
    assert first.weights_TK.isfinite().all() and ((first.weights_TK == 0) == is_none_TK).all()
    assert first.slot_ids_TK is not None and ((first.slot_ids_TK == -1) == is_none_TK).all()


@pytest.mark.parametrize("score", ["softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("codes_from", [1, 1 << 20])
@torch.no_grad()
def test_both_ways_of_selection_add_chunks(
    score: Any, codes_from: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_kernel, "CODES_FROM", codes_from)
    router = make_router(torch.bfloat16, device, score=score)
    x_TD = rows_of(4, torch.bfloat16, device)
    x_TD[2, 7] = float("nan")
    options = extras(4, device)
    assert_same_bits(router(x_TD, **options), in_three(router, x_TD, **options))


@torch.no_grad()
def test_a_row_alone_and_in_company(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone D is split; among 66 rows it is not, with the limits as low as here."""
    monkeypatch.setattr(logits, "SPLIT_BELOW", 2)
    monkeypatch.setattr(select_kernel, "MANY_ROWS", 64)
    router = make_router(torch.float32, device)
    x_TD = rows_of(66, torch.bfloat16, device)
    whole = router(x_TD)
    for row in (0, 40, 65):
        alone = router(x_TD[row : row + 1])
        assert torch.equal(alone.expert_ids_TK[0], whole.expert_ids_TK[row])
        assert torch.equal(alone.weights_TK[0], whole.weights_TK[row])


def test_a_gradient_keeps_the_bits(device: torch.device) -> None:
    router = make_router(torch.float32, device, **DEEPSEEK)
    x_TD, options = rows_of(5, torch.bfloat16, device), extras(5, device)
    with_gradient = router(x_TD, **options)
    assert with_gradient.weights_TK.requires_grad
    with torch.inference_mode():
        assert_same_bits(router(x_TD, **options), with_gradient)
    router.weight.requires_grad_(False)
    without = router(x_TD, **options)
    assert not without.weights_TK.requires_grad
    assert_same_bits(without, with_gradient)


@torch.no_grad()
def test_no_rows_and_no_hidden_size(device: torch.device) -> None:
    router, x_TD, options = make_router(torch.float32, device), rows_of(0, torch.float32, device), extras(0, device)
    with record_launches(device) as names:
        routing = router(x_TD, **options)
    assert names == [] and routing.expert_ids_TK.shape == routing.weights_TK.shape == (0, TOP_K)
    empty = Router(0, 4, top_k=2, device=device, backend="triton")
    assert empty(torch.empty(3, 0, device=device)).expert_ids_TK.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("is_training", [False, True])
def test_errors_come_before_any_launch(backend: Any, is_training: bool, device: torch.device) -> None:
    router = make_router(torch.float32, device)
    router.backend = backend
    x_TD, tables = rows_of(3, torch.float32, device), extras(3, device)["placement_tables"]
    load_E = torch.zeros(EXPERTS, 2, dtype=torch.int64, device=device)[:, 0]
    calls: list[tuple[str, Tensor, dict[str, Any]]] = [
        ("x_TD", x_TD.int(), {}),
        ("w_ED", x_TD[:, 1:], {}),
        ("valid_T", x_TD, {"valid_T": torch.ones(2, dtype=torch.bool, device=device)}),
        ("load_E", x_TD, {"load_E": torch.zeros(EXPERTS, device=device)}),
        ("load_E: found stride 2", x_TD, {"load_E": load_E}),
        ("placement_tables", x_TD, {"placement_tables": (tables[0].int(), tables[1])}),
        ("placement_tables", x_TD, {"placement_tables": (tables[0], tables[1][:-1])}),
    ]
    for named, rows_TD, options in calls:
        with (
            torch.set_grad_enabled(is_training),
            record_launches(device) as names,
            pytest.raises(ConfigError, match=named),
        ):
            router(rows_TD, **options)
        assert names == []
