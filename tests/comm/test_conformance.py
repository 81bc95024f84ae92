"""Every transport carries every case to the oracle's bits, forward and backward; another joins by a name below."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from crossdock import EPGroup, LocalWorld, make_transport
from tests.comm.cases import Case, cases, exchange, oracle
from tests.launch import Ranks, solo

Results = list[dict[str, Tensor]]
Runner = Callable[[int, list[Case]], list[Results]]
WORLDS = (1, 2, 3, 4)


def run_cases(group: EPGroup, transport: str, todo: list[Case]) -> list[dict[str, Tensor]]:
    """All cases on one rank, over one transport."""
    carrier = make_transport(group, transport)
    return [exchange(carrier, case) for case in todo]


def local(world_size: int, todo: list[Case]) -> list[Results]:
    """Virtual ranks; one is the world that needs no threads."""
    if world_size == 1:
        return [[result] for result in solo(run_cases, "local", todo)]
    by_rank = LocalWorld(world_size).run(lambda transport: [exchange(transport, case) for case in todo])
    return [list(results) for results in zip(*by_rank, strict=True)]


@pytest.fixture
def gloo(request: pytest.FixtureRequest) -> Runner:
    """Processes that meet over gloo; those of 2 and 4 ranks are shared by the whole run."""

    def run(world_size: int, todo: list[Case]) -> list[Results]:
        shared = {2: "ranks_of_two", 4: "ranks_of_four"}.get(world_size)
        with nullcontext(request.getfixturevalue(shared)) if shared else Ranks(world_size) as ranks:
            return [list(results) for results in zip(*ranks.run(run_cases, "torch", todo), strict=True)]

    return run


RUNNERS = ("local", "gloo")


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", RUNNERS)
def test_every_case_to_the_bit(name: str, world_size: int, gloo: Runner) -> None:
    if name == "gloo" and world_size == 1:
        pytest.skip("a group of one has no process group")
    todo = cases(world_size)
    for case, found in zip(todo, {"local": local, "gloo": gloo}[name](world_size, todo), strict=True):
        for rank, (have, want) in enumerate(zip(found, oracle(case), strict=True)):
            for key, expected in want.items():
                where = f"{case.name}, rank {rank} of {world_size}, {key}"
                assert have[key].dtype == expected.dtype and have[key].shape == expected.shape, where
                if key == "dweights_TK":  # a sum over D, whose order is the reduction's own
                    torch.testing.assert_close(have[key], expected, rtol=1e-5, atol=1e-5, msg=where)
                else:
                    assert torch.equal(have[key], expected), where
