"""Which launch serves a grouped product: Hopper's own where it can, the portable one everywhere else.

A caller names the portable launch and gets back one of the same arguments and the same bits:

    product = fast_path("fp8_block", grouped_gemm_fp8_triton, q_RK, wq_LNK)
    out_RN = product(q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L, out_dtype)

Hopper's kernels stand on newer parts of Triton than the portable ones. Where they fail, be it that a name is missing or
that the compiler gives up, that costs speed and nothing else: the first failure is told once, and that kind of product
runs portably for the rest of the process.

Legend: R rows, T rows in memory, L groups, N output columns, K inner size.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from crossdock.errors import CrossdockError
from crossdock.gemm.configs import Kind, on_trial

Launch = Callable[..., Any]

MULTIPLES: dict[Kind, int] = {"bf16_swiglu": 32, "fp8_block_swiglu": 256}  # of the weights' columns, gate and up

_given_up: set[Kind] = set()


def fast_path(kind: Kind, portable: Launch, rows_TK: Tensor, weights_LNK: Tensor) -> Launch:
    """Hopper's launch for a product of `kind` with these operands, or `portable`; of the same arguments and bits.

    rows_TK      [T, K], where the product's rows are, gathered or not
    weights_LNK  [L, N, K]; for the fused kinds [L, 2F, D]

    Looks at sizes, strides and the device only, and waits for nothing.
    """
    if kind in _given_up or not takes(kind, rows_TK, weights_LNK):
        return portable
    return partial(_guarded, kind, portable)


def takes(kind: Kind, rows_TK: Tensor, weights_LNK: Tensor) -> bool:
    """Whether Hopper's kernel of `kind` can run on these operands: see `fast_path`.

    On a device of compute capability 9.0; addresses and strides multiples of 16 bytes, as the bulk copy has it; weights
    whose groups stand one behind the other; columns of output a multiple of 16, without which they are stored one by
    one, and where they are quantised of 128.
    """
    if not (is_hopper(rows_TK.device) and rows_TK.numel() and weights_LNK.numel()):
        return False
    if kind.startswith("fp32") or rows_TK.dtype == torch.float32:
        return False
    groups, columns, _ = weights_LNK.shape
    aligned = _rows_aligned(rows_TK) and _rows_aligned(weights_LNK)
    packed = groups == 1 or weights_LNK.stride(0) == columns * weights_LNK.stride(1)
    numbered = max(rows_TK.shape[0], groups * columns) < 2**31 - 256  # rows that a tile may reach past the end
    apart = rows_TK.stride(-2) >= rows_TK.shape[-1]  # no descriptor for rows that overlap
    return aligned and packed and apart and numbered and columns % MULTIPLES.get(kind, 16) == 0


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU of compute capability 9.0."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def _rows_aligned(matrix: Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes."""
    size = matrix.element_size()
    return matrix.stride(-1) == 1 and matrix.data_ptr() % 16 == 0 and matrix.stride(-2) * size % 16 == 0


def _guarded(kind: Kind, portable: Launch, *args: Any, **kwargs: Any) -> Any:
    """Hopper's launch of `kind`, and `portable` where that fails."""
    try:
        return _launch(kind)(*args, **kwargs)
    except (torch.OutOfMemoryError, CrossdockError):  # the portable launch would do no better
        raise
    except Exception as error:  # whatever a compiler raises
        if on_trial(kind):  # it may be that tile's fault, and the tuner drops it
            raise
        _given_up.add(kind)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        warnings.warn(f"Hopper's kernel for {kind} products does not run here: {reason}", stacklevel=3)
        return portable(*args, **kwargs)


def _launch(kind: Kind) -> Launch:
    """The launch of `kind`. Imported late: what these files need of Triton may be missing."""
    if kind == "fp8_block_swiglu":
        from crossdock.gemm.grouped_fp8_swiglu_hopper_kernel import grouped_swiglu_fp8_hopper

        return grouped_swiglu_fp8_hopper
    if kind in ("fp8_block", "fp8_row"):
        from crossdock.gemm.grouped_fp8_hopper_kernel import grouped_gemm_fp8_hopper

        return grouped_gemm_fp8_hopper
    if kind == "bf16_swiglu":
        from crossdock.gemm.grouped_swiglu_hopper_kernel import grouped_swiglu_hopper

        return grouped_swiglu_hopper
    from crossdock.gemm.grouped_hopper_kernel import grouped_gemm_hopper

    return grouped_gemm_hopper
