"""What is the select kernel's own: every output written, the same bits each time and whatever the launch looks like."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.routing import Routing, select_experts, select_experts_ref
from crossdock.routing import select_kernel as module
from crossdock.routing.keys_kernel import limit_groups
from crossdock.routing.rule import Rule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides and overflows aloud

OPTIONS: list[dict[str, Any]] = [
    {"top_k": 8, "score": "sigmoid", "num_groups": 8, "top_groups": 4, "scale": 2.5},
    {"top_k": 3, "score": "softmax"},
    {"top_k": 5, "score": "sqrtsoftplus", "num_groups": 4, "top_groups": 3, "renormalize": False},
]
BY_CODE, IN_ROUNDS = 1, 1 << 20  # places from which codes are used


def operands(rows: int, experts: int, device: torch.device) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    slots_EX = torch.randint(2 * experts, (experts, 3), generator=generator)
    return {
        "logits_TE": (2 * torch.randn(rows, experts, generator=generator)).to(device),
        "bias_E": torch.randn(experts, generator=generator).to(device) / 4,
        "valid_T": (torch.arange(rows) % 5 != 3).to(device),
        "placement_tables": (slots_EX.to(device), (1 + torch.arange(experts) % 3).to(device)),
    }


def assert_same(found: Routing, expected: Routing, rtol: float) -> None:
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    assert found.slot_ids_TK is not None and expected.slot_ids_TK is not None
    assert torch.equal(found.slot_ids_TK, expected.slot_ids_TK)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=rtol, atol=0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("many_rows", "codes_from"), [(1, IN_ROUNDS), (1024, IN_ROUNDS), (1024, BY_CODE)])
def test_matches_the_reference(
    options: dict[str, Any], many_rows: int, codes_from: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One and several rows a program, some past the end, into poisoned outputs; twice, with the same bits."""
    monkeypatch.setattr(module, "MANY_ROWS", many_rows)
    monkeypatch.setattr(module, "CODES_FROM", codes_from)
    args = operands(11, 72, device)
    load_E, again_E, expected_E = torch.zeros(3, 72, dtype=torch.int64, device=device)
    expected = select_experts_ref(**args, **options, load_E=expected_E)  # type: ignore[arg-type]
    found = select_experts(**args, **options, load_E=load_E, backend="triton")  # type: ignore[arg-type]
    again = select_experts(**args, **options, load_E=again_E, backend="triton")  # type: ignore[arg-type]
    assert_same(found, expected, 1e-6)
    assert_same(again, found, 0.0)
    assert torch.equal(load_E, expected_E) and torch.equal(again_E, expected_E)


@pytest.mark.parametrize("options", [OPTIONS[0] | {"top_k": 4}, OPTIONS[1]])
def test_the_launch_does_not_show(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in company or alone, by code or in rounds: the same bits."""
    args = operands(9, 24, device)
    few = select_experts(**args, **options, backend="triton")  # type: ignore[arg-type]
    for many_rows, codes_from in ((1, IN_ROUNDS), (1024, BY_CODE)):
        monkeypatch.setattr(module, "MANY_ROWS", many_rows)
        monkeypatch.setattr(module, "CODES_FROM", codes_from)
        assert_same(select_experts(**args, **options, backend="triton"), few, 0.0)  # type: ignore[arg-type]


# below, at and above 256 places; no powers of two; groups that need padding; as many as there may be
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "kept", "by_code"),
    [
        (128, 8, 1, 1, False),
        (129, 7, 1, 1, True),
        (72, 4, 24, 5, False),
        (136, 6, 17, 4, True),
        (384, 8, 1, 1, True),
        (512, 10, 8, 3, True),
        (896, 16, 1, 1, True),
        (1023, 16, 3, 2, True),
    ],
)
def test_many_experts(experts: int, top_k: int, groups: int, kept: int, by_code: bool, device: torch.device) -> None:
    """Random rows, rows of ties, of two values, of NaN and of infinities, on both sides of the boundary."""
    rule = Rule(experts, top_k, "sigmoid", groups, kept, True, 1.0)
    assert module.constants(rule, 8, 1)["BY_CODE"] == by_code
    generator = torch.Generator().manual_seed(experts)
    logits_TE = torch.randn(7, experts, generator=generator)
    logits_TE[1] = logits_TE[1].bfloat16().float()
    logits_TE[2] = 0.5
    logits_TE[3] = logits_TE[3].sign()
    logits_TE[4, 3:] = float("nan")
    logits_TE[5, ::2] = float("-inf")
    logits_TE[6] = torch.randint(-3, 4, (experts,), generator=generator)
    options: dict[str, Any] = {"top_k": top_k, "num_groups": groups, "top_groups": kept, "score": "sigmoid"}
    found = select_experts(logits_TE.to(device), **options, backend="triton")
    expected = select_experts_ref(logits_TE.to(device), **options)
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=1e-6, atol=0)


def test_keys_too_close_for_a_code(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best keys one rounding apart, all in one bin, and keys a million below in the others: codes can not tell them."""
    experts, top_k = 256, 8
    bias_E = torch.full((experts,), -1e6)
    close = 1000 + torch.arange(32) * 2.0**-13  # every float32 from 1000 on
    bias_E[::8] = close[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    logits_TE = torch.zeros(2, experts)
    logits_TE[1, ::16] = float("nan")
    options: dict[str, Any] = {"top_k": top_k, "bias_E": bias_E.to(device)}
    expected = select_experts_ref(logits_TE.to(device), **options)
    for codes_from in (BY_CODE, IN_ROUNDS):
        monkeypatch.setattr(module, "CODES_FROM", codes_from)
        found = select_experts(logits_TE.to(device), **options, backend="triton")
        assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    assert expected.expert_ids_TK[0].tolist() == bias_E.argsort(descending=True)[:top_k].tolist()


@pytest.mark.parametrize("top_k", [255, 256])
def test_nearly_all_experts(top_k: int, device: torch.device) -> None:
    logits_TE = torch.randn(1, 256, generator=torch.Generator().manual_seed(top_k)).to(device)
    found = select_experts(logits_TE, top_k=top_k, backend="triton")
    assert torch.equal(found.expert_ids_TK, select_experts_ref(logits_TE, top_k=top_k).expert_ids_TK)


def test_limited_keys_keep_whole_groups() -> None:
    keys_TE = torch.tensor([[1.0, 5.0, 3.0, 3.0, 6.0, -1.0]])
    kept_TE = limit_groups(keys_TE, Rule(6, 2, "sigmoid", 3, 2, True, 1.0))
    assert kept_TE.tolist() == [[1.0, 5.0, 3.0, 3.0, float("-inf"), float("-inf")]]


def test_every_audit_signature_names_the_kernels_arguments() -> None:
    for spec in module.AUDIT:
        assert list(spec.signature) == list(spec.kernel.arg_names)
        assert set(spec.constexprs) == {name for name, kind in spec.signature.items() if kind == "constexpr"}
