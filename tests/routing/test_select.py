"""Every implementation of selection against a per-row oracle, and each edge case by itself."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_oracle import select_row
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.routing import Routing, select_experts, select_experts_ref, select_kernel

NAN, INF = math.nan, math.inf
Select = Callable[..., Routing]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def select_on_device(logits_TE: Tensor, **options: Any) -> Routing:
    """The kernel's routing of CPU tensors, back on the CPU."""
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}
    if "placement_tables" in options:
        moved["placement_tables"] = tuple(table.to(DEVICE) for table in options["placement_tables"])
    routing = select_experts(logits_TE.to(DEVICE), backend="triton", **moved)
    if "load_E" in options:
        options["load_E"].copy_(moved["load_E"])
    slots_TK = routing.slot_ids_TK
    return Routing(
        routing.expert_ids_TK.cpu(), routing.weights_TK.cpu(), slots_TK.cpu() if slots_TK is not None else None
    )


def select_by_code(logits_TE: Tensor, **options: Any) -> Routing:
    """The kernel's routing, selected as where experts are many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_kernel, "CODES_FROM", 1)
        return select_on_device(logits_TE, **options)


def select_in_rounds(logits_TE: Tensor, **options: Any) -> Routing:
    """The kernel's routing, selected as where experts are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_kernel, "CODES_FROM", 1 << 20)
        return select_on_device(logits_TE, **options)


IMPLEMENTATIONS: dict[str, Select] = {
    "ref": select_experts_ref,
    "torch": lambda *args, **options: select_experts(*args, backend="torch", **options),
    "rounds": select_in_rounds,
    "code": select_by_code,
}
SCORES = ["sigmoid", "softmax", "sqrtsoftplus"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides and overflows aloud


@pytest.fixture(params=list(IMPLEMENTATIONS))
def select(request: pytest.FixtureRequest) -> Select:
    return IMPLEMENTATIONS[request.param]


def check(select: Select, logits_TE: Tensor, bias_E: Tensor | None = None, **options: Any) -> Routing:
    """The routing, after comparing it with the oracle: ids exactly, weights to a few float32 roundings."""
    routing = select(logits_TE, bias_E=bias_E, **options)
    bias = None if bias_E is None else bias_E.tolist()
    rows = [select_row(row, bias=bias, **options) for row in logits_TE.tolist()]
    assert routing.expert_ids_TK.dtype == torch.int64 and routing.weights_TK.dtype == torch.float32
    assert routing.expert_ids_TK.tolist() == [ids for ids, _ in rows]
    expected = torch.tensor([weights for _, weights in rows], device=logits_TE.device)
    torch.testing.assert_close(routing.weights_TK, expected.view_as(routing.weights_TK), rtol=1e-6, atol=1e-30)
    return routing


# E, top_k, groups, kept groups: DeepSeek-V3, the bundled example, groups of one, no powers of two, one expert
SHAPES = [(256, 8, 8, 4), (16, 4, 4, 2), (12, 5, 12, 7), (60, 6, 5, 3), (7, 7, 1, 1), (130, 3, 1, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("experts", "top_k", "groups", "kept"), SHAPES)
def test_random_rows(select: Select, score: str, experts: int, top_k: int, groups: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    logits_TE = torch.randn(5, experts, generator=generator) * 2
    bias_E = torch.randn(experts, generator=generator) / 3
    options: dict[str, Any] = {"top_k": top_k, "score": score, "num_groups": groups, "top_groups": kept}
    check(select, logits_TE, bias_E, **options, scale=2.5)
    check(select, logits_TE, None, **options, renormalize=False)


def test_1024_experts(select: Select) -> None:
    logits_TE = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    check(select, logits_TE, top_k=16, num_groups=16, top_groups=4)


@pytest.mark.parametrize("score", SCORES)
def test_every_expert_is_chosen(select: Select, score: str) -> None:
    check(select, torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), top_k=6, score=score)


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lowest_id(select: Select, score: str) -> None:
    logits_TE = torch.full((3, 50), 0.3)
    logits_TE[1, 20:] = 1.7
    routing = check(select, logits_TE, top_k=4, score=score)
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2, 3], [20, 21, 22, 23], [0, 1, 2, 3]]


def test_saturated_scores_tie(select: Select) -> None:
    """Logits far above 17 differ, their float32 sigmoids do not."""
    routing = check(select, torch.tensor([[20.0, 90.0, 40.0, 30.0]]), top_k=3)
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2]]


def test_tied_groups_go_to_the_lowest(select: Select) -> None:
    routing = check(select, torch.zeros(1, 12), top_k=4, num_groups=4, top_groups=2)
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2, 3]]


def test_a_tied_pair_counts_twice_in_its_group(select: Select) -> None:
    """Group 0 has 1.0 and 1.0, group 1 has 1.5 and 0.0: masking all that equals the maximum would lose group 0."""
    bias_E = torch.tensor([1.0, 1.0, 0.0, 1.5, 0.0, 0.0]) - 0.5
    routing = check(select, torch.zeros(1, 6), bias_E, top_k=2, num_groups=2, top_groups=1)
    assert routing.expert_ids_TK.tolist() == [[0, 1]]


def test_groups_of_one(select: Select) -> None:
    logits_TE = torch.tensor([[0.1, 0.9, -3.0, 0.5]])
    routing = check(select, logits_TE, top_k=3, num_groups=4, top_groups=2)
    assert routing.expert_ids_TK.tolist() == [[1, 3, -1]]


def test_rejected_groups_lose_to_negative_keys(select: Select) -> None:
    """Kept experts have keys below zero, so that a rejected group masked with zero would win."""
    bias_E = torch.tensor([-2.0, -2.0, -5.0, -5.0])
    routing = check(select, torch.zeros(1, 4), bias_E, top_k=2, num_groups=2, top_groups=1)
    assert routing.expert_ids_TK.tolist() == [[0, 1]]


def test_bias_selects_but_does_not_weigh(select: Select) -> None:
    bias_E = torch.tensor([0.0, 0.0, 1e6])
    routing = check(select, torch.tensor([[2.0, 1.0, -30.0]]), bias_E, top_k=2)
    assert routing.expert_ids_TK.tolist() == [[2, 0]]
    assert routing.weights_TK[0, 0].item() < 1e-12


def test_a_bias_of_minus_infinity_bans(select: Select) -> None:
    routing = check(select, torch.zeros(2, 3), torch.tensor([-INF, 0.0, NAN]), top_k=2)
    assert routing.expert_ids_TK.tolist() == [[1, -1], [1, -1]]


@pytest.mark.parametrize("score", SCORES)
def test_nan_logits_are_never_selected(select: Select, score: str) -> None:
    logits_TE = torch.tensor([[NAN, 1.0, NAN, 2.0], [NAN] * 4, [0.0, 1.0, 2.0, 3.0]])
    routing = check(select, logits_TE, top_k=3, score=score)
    assert routing.expert_ids_TK.tolist() == [[3, 1, -1], [-1, -1, -1], [3, 2, 1]]


@pytest.mark.parametrize("score", SCORES)
def test_minus_infinity_comes_last(select: Select, score: str) -> None:
    logits_TE = torch.tensor([[-INF, 1.0, -INF, -9.0]])
    routing = check(select, logits_TE, top_k=3, score=score)
    assert routing.expert_ids_TK.tolist() == [[1, 3, 0]]
    assert routing.weights_TK[0, 2].item() == 0


@pytest.mark.parametrize(("score", "ids"), [("sigmoid", [0, 1]), ("sqrtsoftplus", [0, 1]), ("softmax", [-1, -1])])
def test_rows_of_minus_infinity(select: Select, score: str, ids: list[int]) -> None:
    """sigmoid and sqrtsoftplus of -inf are zero, the softmax of nothing is not defined."""
    for rest in ([-INF] * 3, [-INF, -INF, NAN]):
        routing = check(select, torch.tensor([rest]), top_k=2, score=score)
        assert routing.expert_ids_TK.tolist() == [ids] and routing.weights_TK.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("score", SCORES)
def test_plus_infinity_is_the_largest_number(select: Select, score: str) -> None:
    routing = check(select, torch.tensor([[0.0, INF, 5.0, INF]]), top_k=2, score=score)
    assert routing.expert_ids_TK.tolist() == [[1, 3]] and routing.weights_TK.tolist() == [[0.5, 0.5]]


def test_fewer_selectable_than_top_k(select: Select) -> None:
    """A kept group of three can not fill five places."""
    routing = check(select, torch.zeros(1, 6), top_k=5, num_groups=2, top_groups=1, scale=3.0)
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2, -1, -1]]
    assert routing.weights_TK.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("score", SCORES)
def test_rows_not_valid_have_no_expert(select: Select, score: str) -> None:
    logits_TE = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    logits_TE[1] = NAN
    valid_T = torch.tensor([True, False, False, True])
    load_E = torch.zeros(8, dtype=torch.int64)
    routing = select(logits_TE, top_k=2, score=score, valid_T=valid_T, load_E=load_E)
    whole = select(logits_TE, top_k=2, score=score)
    assert torch.equal(routing.expert_ids_TK, whole.expert_ids_TK.where(valid_T[:, None], torch.tensor(-1)))
    assert torch.equal(routing.weights_TK, whole.weights_TK * valid_T[:, None])
    assert load_E.sum() == 4


def test_no_rows(select: Select) -> None:
    tables = torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, dtype=torch.int64)
    load_E = torch.zeros(8, dtype=torch.int64)
    for groups in (1, 4):
        logits_TE = torch.empty(0, 8)
        routing = select(logits_TE, top_k=3, num_groups=groups, top_groups=1, placement_tables=tables, load_E=load_E)
        assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (0, 3)
        assert routing.slot_ids_TK is not None and routing.slot_ids_TK.shape == (0, 3)
    assert load_E.sum() == 0


def test_replicas_are_taken_in_turn(select: Select) -> None:
    slots_EX = torch.tensor([[7, 2, 4], [1, -1, -1], [5, 0, -1], [3, -1, -1]])
    count_E = torch.tensor([3, 1, 2, 1])
    logits_TE = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    logits_TE[4, 1:] = NAN
    routing = select(logits_TE, top_k=3, placement_tables=(slots_EX, count_E))
    assert routing.slot_ids_TK is not None and routing.slot_ids_TK.dtype == torch.int64
    for row, (ids, slots) in enumerate(zip(routing.expert_ids_TK.tolist(), routing.slot_ids_TK.tolist(), strict=True)):
        assert slots == [-1 if e < 0 else slots_EX[e, row % count_E[e]].item() for e in ids]
    assert select(logits_TE, top_k=3).slot_ids_TK is None


def test_loads_are_added(select: Select) -> None:
    logits_TE = torch.randn(20, 6, generator=torch.Generator().manual_seed(4))
    logits_TE[3] = NAN
    load_E = torch.arange(6)
    routing = select(logits_TE, top_k=2, load_E=load_E)
    chosen = routing.expert_ids_TK[routing.expert_ids_TK >= 0]
    assert torch.equal(load_E, torch.arange(6) + torch.bincount(chosen, minlength=6))
    assert load_E.sum() == 15 + 2 * 19


def test_rows_do_not_depend_on_their_company(select: Select) -> None:
    generator = torch.Generator().manual_seed(5)
    logits_TE, bias_E = torch.randn(11, 20, generator=generator), torch.randn(20, generator=generator) / 9
    for score in SCORES:
        options: dict[str, Any] = {"top_k": 6, "score": score, "bias_E": bias_E, "num_groups": 5, "top_groups": 3}
        whole = select(logits_TE, **options)
        for rows in (slice(0, 1), slice(7, 8), slice(3, 10)):
            part = select(logits_TE[rows], **options)
            assert torch.equal(part.expert_ids_TK, whole.expert_ids_TK[rows])
            assert torch.equal(part.weights_TK, whole.weights_TK[rows])


def test_square_roots_outlast_what_they_are_of(select: Select) -> None:
    """softplus of -170 is no float32, its root is one, and is more than nothing."""
    rows = torch.tensor([[-INF, -170.0, -150.0], [NAN, -110.0, -171.0], [-25.0, -19.0, -21.0]])
    check(select, rows, top_k=2, score="sqrtsoftplus")
    check(select, rows, top_k=2, score="sqrtsoftplus", renormalize=False)


def test_strided_logits(select: Select) -> None:
    wide = torch.randn(4, 24, generator=torch.Generator().manual_seed(6))
    check(select, wide[:, ::2], top_k=3)
    check(select, wide.T, top_k=2, score="softmax", num_groups=2, top_groups=1)


VALUES = st.sampled_from([NAN, -INF, INF, 0.0, -0.0, 0.5, 0.5, -2.0, 3.0, 40.0, 50.0, -170.0])


@settings(max_examples=40, deadline=None)
@given(
    row=st.lists(VALUES, min_size=12, max_size=12),
    bias=st.none() | st.lists(st.sampled_from([0.0, 0.25, -1.0, -INF]), min_size=12, max_size=12),
    score=st.sampled_from(SCORES),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 5), (12, 4)]),
    top_k=st.integers(1, 12),
)
def test_awkward_rows(
    row: list[float], bias: list[float] | None, score: str, groups: tuple[int, int], top_k: int
) -> None:
    bias_E = None if bias is None else torch.tensor(bias)
    options: dict[str, Any] = {"top_k": top_k, "score": score, "num_groups": groups[0], "top_groups": groups[1]}
    for select in IMPLEMENTATIONS.values():
        check(select, torch.tensor([row]), bias_E, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_k": 9}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"score": "tanh"}, "score"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups"),
        ({"bias_E": torch.zeros(7)}, "bias_E"),
        ({"valid_T": torch.ones(2)}, "valid_T"),
        ({"load_E": torch.zeros(8)}, "load_E"),
        ({"placement_tables": (torch.zeros(8, 1), torch.ones(8))}, "placement_tables"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], named: str) -> None:
    for select in IMPLEMENTATIONS.values():
        with pytest.raises(ConfigError, match=named):
            select(torch.zeros(2, 8), **({"top_k": 2} | options))


def test_logits_must_be_float32() -> None:
    with pytest.raises(ConfigError, match="logits_TE"):
        select_experts(torch.zeros(2, 8).bfloat16(), top_k=2)
    with pytest.raises(ConfigError, match="num_experts"):
        select_experts(torch.zeros(2, 2048), top_k=2)
