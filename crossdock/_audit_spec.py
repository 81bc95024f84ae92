"""What `crossdock audit` needs to know to compile one kernel for a target with no device present."""

from dataclasses import dataclass, field
from typing import Any

SHARED_BYTES = {"sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # shared memory a block may have
TARGETS = tuple(SHARED_BYTES)


@dataclass(frozen=True)
class KernelSpec:
    """One production configuration of one kernel.

    `signature` gives every argument in order as a Triton type ("*bf16", "*fp8e4nv", "i32", ..., "constexpr");
    `constexprs` gives the values of those marked "constexpr". `needs_matrix_instruction` says that the main loop is a
    matrix product, so that a build without wgmma, mma, tcgen05 or mfma in it has gone wrong. `targets` are those that
    the kernel is meant for. `kind` is set where the tile comes from gemm/configs.py: the kind of product, one of its
    KINDS; the audit then compiles the kernel with every tile that production shapes get on a target. `multiples` names
    integers that are multiples of 16 in production, which a launch finds out for itself and compiles for.
    `needs_bulk_copy` says that a build for sm_90 without a bulk tensor copy in it has gone wrong.
    """

    name: str
    kernel: Any
    config: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    needs_matrix_instruction: bool = False
    targets: tuple[str, ...] = TARGETS
    kind: str = ""
    multiples: tuple[str, ...] = ()
    needs_bulk_copy: bool = False
