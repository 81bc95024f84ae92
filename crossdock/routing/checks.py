"""Checks of tensor arguments, apart from the operators so that those read as what they compute.

Legend: T tokens on this rank, D hidden, E logical experts, X most replicas of any expert.
"""

import torch
from torch import Tensor

from crossdock.errors import ConfigError

PlacementTables = tuple[Tensor, Tensor]  # logical_to_physical_EX (-1: no such replica) and replica_count_E, int64
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError where `tensor` has another shape, dtype or device."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        found = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ConfigError(f"{name}: found {found}, expected {list(shape)} {dtype} on {device}")


def check_logits(logits_TE: Tensor) -> None:
    """Raises ConfigError where logits are not float32 [T, E]."""
    if logits_TE.dim() != 2 or logits_TE.dtype != torch.float32:
        raise ConfigError(f"logits_TE: found {list(logits_TE.shape)} {logits_TE.dtype}, expected [T, E] torch.float32")


def check_options(
    rows: int,
    num_experts: int,
    device: torch.device,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    placement_tables: PlacementTables | None,
    load_E: Tensor | None,
) -> None:
    """Raises ConfigError where a tensor does not fit `rows` rows of logits over `num_experts` on `device`."""
    if bias_E is not None:
        check_tensor("bias_E", bias_E, (num_experts,), torch.float32, device)
    if valid_T is not None:
        check_tensor("valid_T", valid_T, (rows,), torch.bool, device)
    if load_E is not None:
        check_tensor("load_E", load_E, (num_experts,), torch.int64, device)
        if not load_E.is_contiguous():
            raise ConfigError(f"load_E: found stride {load_E.stride(0)}, expected 1, as it is added to in place")
    if placement_tables is not None:
        slots_EX, count_E = placement_tables
        most = slots_EX.shape[1] if slots_EX.dim() == 2 else 1
        check_tensor("placement_tables[0]", slots_EX, (num_experts, most), torch.int64, device)
        check_tensor("placement_tables[1]", count_E, (num_experts,), torch.int64, device)


def check_product(x_TD: Tensor, w_ED: Tensor) -> None:
    """Raises ConfigError where activations and router weight do not fit together."""
    if x_TD.dim() != 2 or x_TD.dtype not in FLOATS:
        raise ConfigError(f"x_TD: found {list(x_TD.shape)} {x_TD.dtype}, expected [T, D] float32, bfloat16 or float16")
    if w_ED.dim() != 2 or w_ED.dtype not in FLOATS or w_ED.shape[1] != x_TD.shape[1] or w_ED.device != x_TD.device:
        found = f"{list(w_ED.shape)} {w_ED.dtype} on {w_ED.device}"
        raise ConfigError(
            f"w_ED: found {found}, expected [E, {x_TD.shape[1]}] float32, bfloat16 or float16 on {x_TD.device}"
        )
