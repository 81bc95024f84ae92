"""Argument checks the grouped products share, so that a wrong tensor is named before a kernel reads past its end.

Legend: R rows, L groups, N output columns, K inner size.

Values of `ends` are checked only on a CPU: on a GPU reading them would stop the host until the device has caught up.
"""

import torch
from torch import Tensor

from crossdock.errors import ConfigError


def check_rank(name: str, tensor: Tensor, form: str) -> None:
    """Raises ConfigError unless `tensor` has as many dimensions as `form` ("L, N, K") names."""
    expected = form.count(",") + 1
    if tensor.dim() != expected:
        raise ConfigError(f"{name} must have {expected} dimensions [{form}], found shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Raises ConfigError unless the shape is `expected`; `why` says where that comes from."""
    if tensor.shape != expected:
        raise ConfigError(f"{name} must have shape {expected} ({why}), found {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, expected: tuple[torch.dtype, ...], why: str) -> None:
    """Raises ConfigError unless the dtype is one of `expected`."""
    if tensor.dtype not in expected:
        wanted = " or ".join(str(dtype) for dtype in expected)
        raise ConfigError(f"{name} must be {wanted} ({why}), found {tensor.dtype}")


def check_same_device(name: str, tensor: Tensor, *others: tuple[str, Tensor]) -> None:
    """Raises ConfigError unless every one of `others`, (name, tensor), is where `tensor` is."""
    for other_name, other in others:
        if other.device != tensor.device:
            raise ConfigError(f"{other_name} is on {other.device}, but {name} is on {tensor.device}")


def check_groups(rows_RK: Tensor, weights_LNK: Tensor, ends_L: Tensor, rows_name: str, weights_name: str) -> None:
    """Raises ConfigError unless rows, weights and ends fit one another; on a CPU ends' values are checked too."""
    check_rank(rows_name, rows_RK, "R, K")
    check_rank(weights_name, weights_LNK, "L, N, K")
    groups, _, inner = weights_LNK.shape
    if rows_RK.shape[1] != inner:
        raise ConfigError(f"{rows_name} has inner size K={rows_RK.shape[1]}, but {weights_name} has K={inner}")
    check_dtype("ends_L", ends_L, (torch.int32,), "row counts are read on the device as int32")
    check_shape("ends_L", ends_L, (groups,), f"one end for each group of {weights_name}")
    check_same_device(rows_name, rows_RK, (weights_name, weights_LNK), ("ends_L", ends_L))
    if ends_L.device.type == "cpu":
        check_ends(ends_L.tolist(), rows_RK.shape[0])


def check_ends(ends: list[int], rows: int) -> None:
    """Raises ConfigError unless 0 <= ends[0] <= ends[1] <= ... == rows."""
    start = 0
    for group, end in enumerate(ends):
        if end < start:
            raise ConfigError(f"ends_L must not decrease: group {group} ends at {end} but starts at {start}")
        start = end
    if start != rows:
        raise ConfigError(f"ends_L must end at the number of rows, {rows}, found {start}")
