"""What `crossdock audit` needs to know to compile one kernel for a target with no device present."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelSpec:
    """One production configuration of one kernel.

    `signature` gives every argument in order as a Triton type ("*bf16", "*fp8e4nv", "i32", ..., "constexpr");
    `constexprs` gives the values of those marked "constexpr". `needs_matrix_instruction` says that the main loop is a
    matrix product, so that a build without wgmma, mma, tcgen05 or mfma in it has gone wrong.
    """

    name: str
    kernel: Any
    config: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    needs_matrix_instruction: bool = False
