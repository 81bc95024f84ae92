"""What is the select kernel's own: every output written, the same bits each time, rows of a program told apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.routing import Routing, select_experts, select_experts_ref
from crossdock.routing import select_kernel as module

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides and overflows aloud

OPTIONS: list[dict[str, Any]] = [
    {"top_k": 8, "score": "sigmoid", "num_groups": 8, "top_groups": 4, "scale": 2.5},
    {"top_k": 3, "score": "softmax"},
    {"top_k": 5, "score": "sqrtsoftplus", "num_groups": 4, "top_groups": 3, "renormalize": False},
]


def operands(rows: int, experts: int, device: torch.device) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    slots_EX = torch.randint(2 * experts, (experts, 3), generator=generator)
    return {
        "logits_TE": (2 * torch.randn(rows, experts, generator=generator)).to(device),
        "bias_E": torch.randn(experts, generator=generator).to(device) / 4,
        "valid_T": (torch.arange(rows) % 5 != 3).to(device),
        "placement_tables": (slots_EX.to(device), (1 + torch.arange(experts) % 3).to(device)),
    }


def poisoned_empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else -(2**60), dtype=dtype, device=device)


def assert_same(found: Routing, expected: Routing, rtol: float) -> None:
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    assert found.slot_ids_TK is not None and expected.slot_ids_TK is not None
    assert torch.equal(found.slot_ids_TK, expected.slot_ids_TK)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=rtol, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("many_rows", [1, 1024])
def test_matches_the_reference(
    options: dict[str, Any], many_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One and several rows a program, some past the end, into poisoned outputs; twice, with the same bits."""
    monkeypatch.setattr(module, "MANY_ROWS", many_rows)
    args = operands(11, 72, device)
    load_E, again_E, expected_E = torch.zeros(3, 72, dtype=torch.int64, device=device)
    expected = select_experts_ref(**args, **options, load_E=expected_E)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        found = select_experts(**args, **options, load_E=load_E, backend="triton")  # type: ignore[arg-type]
        again = select_experts(**args, **options, load_E=again_E, backend="triton")  # type: ignore[arg-type]
    assert_same(found, expected, 1e-6)
    assert_same(again, found, 0.0)
    assert torch.equal(load_E, expected_E) and torch.equal(again_E, expected_E)


def test_rows_a_program_do_not_show(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    args = operands(9, 24, device)
    options = OPTIONS[0] | {"top_k": 4}
    few = select_experts(**args, **options, backend="triton")  # type: ignore[arg-type]
    monkeypatch.setattr(module, "MANY_ROWS", 1)
    assert_same(select_experts(**args, **options, backend="triton"), few, 0.0)  # type: ignore[arg-type]


def test_every_audit_signature_names_the_kernels_arguments() -> None:
    for spec in module.AUDIT:
        assert list(spec.signature) == list(spec.kernel.arg_names)
        assert set(spec.constexprs) == {name for name, kind in spec.signature.items() if kind == "constexpr"}
