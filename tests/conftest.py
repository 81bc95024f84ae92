"""Without a GPU, kernels run in Triton's interpreter, which must be chosen before crossdock defines them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tests are small, and several ranks' threads in one process would wait for one another

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402

from tests.launch import Ranks  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ranks_of_two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def ranks_of_four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks
