"""The audited configurations fit their kernels, and the FP8 product compiles to what it was written for."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from crossdock._audit_spec import KernelSpec

MODULES = [
    "quantize_kernel",
    "swiglu_kernel",
    "grouped_kernel",
    "grouped_dw_kernel",
    "grouped_fp8_kernel",
    "grouped_swiglu_kernel",
    "grouped_fp8_swiglu_kernel",
]

COMPILE = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from crossdock.gemm.grouped_fp8_kernel import AUDIT

found = []
for spec in AUDIT[1:]:
    source = ASTSource(fn=spec.kernel, signature=spec.signature, constexprs=spec.constexprs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found.append({"shared": built.metadata.shared, "wgmma": built.asm["ptx"].count(".f32.e4m3.e4m3")})
print(json.dumps(found))
"""


@pytest.mark.parametrize("module", MODULES)
def test_specs_fit_their_kernels(module: str) -> None:
    specs: list[KernelSpec] = importlib.import_module(f"crossdock.gemm.{module}").AUDIT
    assert specs
    for spec in specs:
        assert list(spec.signature) == list(spec.kernel.arg_names)
        assert {name for name, kind in spec.signature.items() if kind == "constexpr"} == set(spec.constexprs)


def test_fp8_uses_the_tensor_cores_of_sm_90() -> None:
    """Needs no device; in its own process, since here kernels belong to the interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=_compiler_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    for build in json.loads(done.stdout):
        assert build["wgmma"] >= 4  # 128 of K in steps of 32
        assert build["shared"] <= 227 * 1024


def _compiler_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


UNIT = """
from dataclasses import replace
from crossdock.cli.audit_worker import examine
from crossdock.gemm.grouped_swiglu_kernel import AUDIT

spec = AUDIT[0]
signature = spec.signature | {"F": "constexpr"}
built = examine(replace(spec, signature=signature, constexprs=spec.constexprs | {"F": 1, "EVEN_N": False}), "sm_90")
assert built["why"] == "", built["why"]
"""


def test_swiglu_compiles_where_triton_knows_that_a_size_is_one() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", UNIT], capture_output=True, text=True, env=_compiler_environment())
    assert done.returncode == 0, done.stderr
