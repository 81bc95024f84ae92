"""Every transport carries every case to the oracle's bits, forward and backward; another joins by a name below."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from crossdock import EPGroup, LocalWorld, make_transport
from crossdock.parallel import Topology
from tests.comm.cases import FORMS, Case, cases, exchange, oracle, oracle_over_nodes
from tests.launch import Ranks, solo

Results = list[dict[str, Tensor]]
Runner = Callable[..., list[Results]]  # of nodes, cases and form
WORLDS = (1, 2, 3, 4)
NODES = {"2x1": (0, 1), "2x2": (0, 0, 1, 1), "2x2 interleaved": (0, 1, 0, 1), "2x2 nested": (0, 1, 1, 0),
         "1x4": (0, 0, 0, 0), "4x1": (0, 1, 2, 3), "3x1": (0, 1, 2), "3x2": (0, 0, 1, 1, 2, 2),
         "7x1": (0, 1, 2, 3, 4, 5, 6)}  # fmt: skip
TO_ROUNDING = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def run_cases(group: EPGroup, transport: str, nodes: tuple[int, ...], todo: list[Case], form: str) -> Results:
    """All cases on one rank, over one transport, whose ranks are said to stand on those nodes."""
    carrier = make_transport(group, transport)
    carrier.topology = Topology(nodes)  # type: ignore[misc]
    return [exchange(carrier, case, form) for case in todo]


def local(nodes: tuple[int, ...], todo: list[Case], form: str) -> list[Results]:
    """Virtual ranks; one is the world that needs no threads."""
    if len(nodes) == 1:
        return [[result] for result in solo(run_cases, "local", nodes, todo, form)]
    world = LocalWorld(len(nodes), topology=Topology(nodes))
    by_rank = world.run(lambda transport: [exchange(transport, case, form) for case in todo])
    return [list(results) for results in zip(*by_rank, strict=True)]


@pytest.fixture
def gloo(request: pytest.FixtureRequest) -> Runner:
    """Processes that meet over gloo; those of 2 and 4 ranks are shared by the whole run."""

    def run(nodes: tuple[int, ...], todo: list[Case], form: str, transport: str = "torch") -> list[Results]:
        shared = {2: "ranks_of_two", 4: "ranks_of_four"}.get(len(nodes))
        with nullcontext(request.getfixturevalue(shared)) if shared else Ranks(len(nodes)) as ranks:
            return [list(results) for results in zip(*ranks.run(run_cases, transport, nodes, todo, form), strict=True)]

    return run


RUNNERS = ("local", "gloo")


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", RUNNERS)
def test_every_case_to_the_bit(name: str, world_size: int, gloo: Runner) -> None:
    if name == "gloo" and world_size == 1:
        pytest.skip("a group of one has no process group")
    todo = cases(world_size)
    for case, found in zip(todo, {"local": local, "gloo": gloo}[name]((0,) * world_size, todo, "flat"), strict=True):
        compare(case, found, oracle(case), exact_dx=True)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("shape", NODES)
def test_every_case_over_nodes_to_the_bit(shape: str, form: str) -> None:
    todo = cases(len(NODES[shape]))
    for case, found in zip(todo, local(NODES[shape], todo, form), strict=True):
        compare(case, found, oracle_over_nodes(case, NODES[shape]), exact_dx=False)


@pytest.mark.parametrize("form", ["flat", "node"])
def test_every_case_where_a_token_goes_to_a_rank_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows that saves; one of the cases has so many that it does so by itself."""
    monkeypatch.setattr("crossdock.comm.once.WORTH_BYTES", -1)
    nodes = NODES["2x2"] if form == "node" else (0, 0, 0)
    todo = cases(len(nodes))
    for case, found in zip(todo, local(nodes, todo, form), strict=True):
        expected = oracle(case) if form == "flat" else oracle_over_nodes(case, nodes)
        compare(case, found, expected, exact_dx=form == "flat")


@pytest.mark.parametrize(
    ("shape", "transport"),
    [("2x1", "torch"), ("2x2", "torch"), ("2x2 interleaved", "torch"), ("4x1", "torch"), ("2x2", "symmetric")],
)
def test_every_case_over_nodes_of_processes_to_the_bit(shape: str, transport: str, gloo: Runner) -> None:
    todo = cases(len(NODES[shape]))[:: 3 if transport == "symmetric" else 1]  # whose kernels are interpreted
    for case, found in zip(todo, gloo(NODES[shape], todo, "node", transport), strict=True):
        compare(case, found, oracle_over_nodes(case, NODES[shape]), exact_dx=False)


def compare(case: Case, found: Results, expected: Results, *, exact_dx: bool) -> None:
    """dweights are sums over D, whose order is the reduction's own; dx over nodes is rounded on its way."""
    for rank, (have, want) in enumerate(zip(found, expected, strict=True)):
        for key, tensor in want.items():
            where = f"{case.name}, rank {rank} of {case.world_size}, {key}"
            assert have[key].dtype == tensor.dtype and have[key].shape == tensor.shape, where
            if key == "dweights_TK" or (key == "dx_TD" and not exact_dx):
                tolerance = TO_ROUNDING.get(case.dtype, 1e-5) if key == "dx_TD" else 1e-5
                torch.testing.assert_close(have[key], tensor, rtol=tolerance, atol=tolerance, msg=where)
            else:
                assert torch.equal(have[key], tensor), where
