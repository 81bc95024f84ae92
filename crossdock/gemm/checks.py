"""Argument checks the grouped products share, so that a wrong tensor is named before a kernel reads past its end.

Legend: R rows in group order, T rows in memory, L groups, N output columns, K inner size, M rows of a slab.

Values of `ends`, counts and row ids are checked on a CPU always. On a GPU reading them would stop the host until the
device has caught up, so there they are checked where `checked` asks for it.
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


def check_groups(
    rows_TK: Tensor,
    weights_LNK: Tensor,
    ends_L: Tensor,
    rows_name: str,
    weights_name: str,
    row_ids_R: Tensor | None = None,
    may_end_early: bool = False,
    checked: bool = False,
) -> None:
    """Raises ConfigError unless rows, weights, ends and row ids fit one another, and their values where those are read.

    With `row_ids_R` or `may_end_early` the last end may be below R; what lies behind it is not looked at.
    """
    check_rank(rows_name, rows_TK, "R, K")
    _check_weights(rows_name, rows_TK, weights_name, weights_LNK)
    _check_per_group("ends_L", ends_L, rows_name, rows_TK, weights_name, weights_LNK)
    if row_ids_R is not None:
        check_rank("row_ids_R", row_ids_R, "R")
        check_dtype("row_ids_R", row_ids_R, (torch.int32, torch.int64), f"rows of {rows_name}")
        check_same_device(rows_name, rows_TK, ("row_ids_R", row_ids_R))
    if not checked and ends_L.device.type != "cpu":
        return
    if row_ids_R is None:
        check_ends(ends_L.tolist(), rows_TK.shape[0], "rows", may_end_early)
    else:
        used = check_ends(ends_L.tolist(), row_ids_R.shape[0], "row ids", may_end_early=True)
        check_row_ids(row_ids_R[:used], rows_TK.shape[0], rows_name)


def check_slabs(
    rows_LMK: Tensor, weights_LNK: Tensor, counts_L: Tensor, rows_name: str, weights_name: str, checked: bool = False
) -> None:
    """The same for the masked layout: raises ConfigError also where a count is below 0 or above M, where it is read."""
    check_rank(rows_name, rows_LMK, "L, M, K")
    _check_weights(rows_name, rows_LMK, weights_name, weights_LNK)
    groups, slab, _ = rows_LMK.shape
    if groups != weights_LNK.shape[0]:
        raise ConfigError(f"{rows_name} has L={groups} groups, but {weights_name} has L={weights_LNK.shape[0]}")
    _check_per_group("counts_L", counts_L, rows_name, rows_LMK, weights_name, weights_LNK)
    if checked or counts_L.device.type == "cpu":
        for group, count in enumerate(counts_L.tolist()):
            if not 0 <= count <= slab:
                raise ConfigError(f"counts_L must be in [0, M = {slab}], found {count} for group {group}")


def _check_weights(rows_name: str, rows: Tensor, weights_name: str, weights_LNK: Tensor) -> None:
    check_rank(weights_name, weights_LNK, "L, N, K")
    if rows.shape[-1] != weights_LNK.shape[2]:
        raise ConfigError(
            f"{rows_name} has inner size K={rows.shape[-1]}, but {weights_name} has K={weights_LNK.shape[2]}"
        )


def _check_per_group(
    name: str, per_group_L: Tensor, rows_name: str, rows: Tensor, weights_name: str, weights_LNK: Tensor
) -> None:
    check_dtype(name, per_group_L, (torch.int32,), "row counts are read on the device as int32")
    what = name.removesuffix("s_L")
    check_shape(name, per_group_L, (weights_LNK.shape[0],), f"one {what} for each group of {weights_name}")
    check_same_device(rows_name, rows, (weights_name, weights_LNK), (name, per_group_L))


def check_halves(name: str, weights_L2FD: Tensor) -> None:
    """Raises ConfigError unless the rows of `weights` divide into gate and up."""
    if weights_L2FD.shape[1] % 2:
        raise ConfigError(f"{name} must have an even number of rows, gate and up, found {weights_L2FD.shape[1]}")


def check_ends(ends: list[int], rows: int, what: str = "rows", may_end_early: bool = False) -> int:
    """The last end. Raises ConfigError unless 0 <= ends[0] <= ends[1] <= ... == rows (<= where `may_end_early`)."""
    start = 0
    for group, end in enumerate(ends):
        if end < start:
            raise ConfigError(f"ends_L must not decrease: group {group} ends at {end} but starts at {start}")
        start = end
    if start > rows or (start < rows and not may_end_early):
        how = "not end beyond" if may_end_early else "end at"
        raise ConfigError(f"ends_L must {how} the number of {what}, {rows}, found {start}")
    return start


def check_row_ids(used_R: Tensor, rows: int, rows_name: str) -> None:
    """Raises ConfigError, naming the first culprit, unless all of the ids in use name one of `rows` rows."""
    for place, row in enumerate(used_R.tolist()):
        if not 0 <= row < rows:
            raise ConfigError(f"row_ids_R must be in [0, {rows}), the rows of {rows_name}, found {row} at {place}")
