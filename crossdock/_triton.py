"""Triton where it is installed, a stand-in where it is not, so that importing crossdock never needs it.

Kernel files import `triton` and `tl` from here and define their kernels at import; without Triton the definitions
still parse and only a launch raises. Kernel files must not use `from __future__ import annotations`: Triton reads the
`tl.constexpr` annotations as objects.
"""

from typing import Any

from crossdock.errors import ConfigError

__all__ = ["HAS_TRITON", "interpreting", "tl", "triton"]

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:

    class _Absent:
        """Takes the place of `triton` and `tl`: decorators return a launcher that raises, attributes chain."""

        constexpr = object

        def jit(self, fn: Any = None, **_: Any) -> Any:
            return _Absent() if fn is not None else (lambda f: _Absent())

        def __getattr__(self, name: str) -> Any:
            return _Absent()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

        def __getitem__(self, grid: Any) -> Any:
            raise ConfigError("backend='triton' was asked for, but the triton package is not installed")

    triton = _Absent()
    tl = _Absent()
    HAS_TRITON = False


def interpreting() -> bool:
    """True where kernels run in Triton's interpreter (TRITON_INTERPRET=1), the only way to run them on CPU tensors."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)
