"""Argument checks of the routing operators, apart from them so that the operators read as what they compute.

Legend: T tokens on this rank, D hidden, E logical experts, K experts per token, X most replicas of any expert.
"""

import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.routing.scores import SCORES

MAX_EXPERTS = 1024

PlacementTables = tuple[Tensor, Tensor]  # logical_to_physical_EX and replica_count_E, both int64


def check_selection(num_experts: int, top_k: int, score: str, num_groups: int, top_groups: int) -> None:
    """Raises ConfigError where these options cannot describe a router."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ConfigError(f"number of experts: found {num_experts}, expected 1 to {MAX_EXPERTS}")
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k: found {top_k}, expected 1 to the {num_experts} experts")
    if score not in SCORES:
        raise ConfigError(f"score: found {score!r}, expected one of {', '.join(SCORES)}")
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(f"num_groups: found {num_groups}, expected a divisor of the {num_experts} experts")
    if not 1 <= top_groups <= num_groups:
        raise ConfigError(f"top_groups: found {top_groups}, expected 1 to the {num_groups} groups")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError where `tensor` has another shape, dtype or device."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        found = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ConfigError(f"{name}: found {found}, expected {list(shape)} {dtype} on {device}")


def check_operands(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    placement_tables: PlacementTables | None,
    load_E: Tensor | None,
) -> None:
    """Raises ConfigError where a tensor does not fit the float32 logits [T, E]."""
    if logits_TE.dim() != 2 or logits_TE.dtype != torch.float32:
        raise ConfigError(f"logits_TE: found {list(logits_TE.shape)} {logits_TE.dtype}, expected [T, E] torch.float32")
    (rows, num_experts), device = logits_TE.shape, logits_TE.device
    if bias_E is not None:
        check_tensor("bias_E", bias_E, (num_experts,), torch.float32, device)
    if valid_T is not None:
        check_tensor("valid_T", valid_T, (rows,), torch.bool, device)
    if load_E is not None:
        check_tensor("load_E", load_E, (num_experts,), torch.int64, device)
    if placement_tables is not None:
        slots_EX, count_E = placement_tables
        width = slots_EX.shape[-1] if slots_EX.dim() == 2 else 0
        check_tensor("placement_tables[0]", slots_EX, (num_experts, max(width, 1)), torch.int64, device)
        check_tensor("placement_tables[1]", count_E, (num_experts,), torch.int64, device)


def check_product(x_TD: Tensor, w_ED: Tensor) -> None:
    """Raises ConfigError where activations and router weight do not fit together."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if x_TD.dim() != 2 or x_TD.dtype not in floats:
        raise ConfigError(f"x_TD: found {list(x_TD.shape)} {x_TD.dtype}, expected [T, D] float32, bfloat16 or float16")
    if w_ED.dim() != 2 or w_ED.dtype not in floats or w_ED.shape[1] != x_TD.shape[1] or w_ED.device != x_TD.device:
        found = f"{list(w_ED.shape)} {w_ED.dtype} on {w_ED.device}"
        raise ConfigError(f"w_ED: found {found}, expected [E, {x_TD.shape[1]}] of a float type on {x_TD.device}")
