"""One worker of `crossdock audit` and `tune`: compiles its share of (kernel, target) and prints a JSON line for each.

Registers and spills are what `ptxas -v` says of the PTX, or what the gfx942 assembly's metadata says. A build is not ok
when it fails, needs more shared memory than a block can have, or when its main loop should be a matrix product and it
spills or has no matrix instruction. Spills are bytes on NVIDIA and registers on AMD, as the tools give them.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from crossdock._audit_spec import SHARED_BYTES, KernelSpec
from crossdock.cli.audit_tiles import expand

PACKAGES = ("crossdock.gemm", "crossdock.routing", "crossdock.comm", "crossdock.moe", "crossdock.models")
MATRIX = {"wgmma": r"\bwgmma\.mma_async", "tcgen05.mma": r"\btcgen05\.mma", "mma.sync": r"\bmma\.sync"}


def find_specs(modules: list[str]) -> list[KernelSpec]:
    """The AUDIT lists of `modules`, or of every module of crossdock's kernel packages, with every production tile."""
    specs: list[KernelSpec] = []
    for name in modules or _kernel_modules():
        specs += getattr(importlib.import_module(name), "AUDIT", [])
    return expand(specs)  # which also drops what a package re-exports of a module's list


def _kernel_modules() -> Iterator[str]:
    for name in PACKAGES:
        package = importlib.import_module(name)
        yield name
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            yield module.name


def examine(spec: KernelSpec, target: str) -> dict[str, Any]:
    """Compiles one kernel for one target: one entry of `audit --json`, with "why" where it is not ok."""
    result: dict[str, Any] = {
        "kernel": spec.name,
        "target": target,
        "config": spec.config,
        "registers": None,
        "spills": None,
        "shared_bytes": None,
        "matrix_instructions": [],
        "bulk_copy": False,
    }
    try:
        built = compile_for(spec, target)
        registers, spills = _amd_usage(built.asm["amdgcn"]) if target == "gfx942" else _ptxas_usage(built, target)
    except Exception as error:  # whatever a compiler raises is this build's result
        why = " ".join(str(error).split()) or type(error).__name__
        return result | {"ok": False, "why": f"does not compile: {why[-400:]}"}
    found = matrix_instructions(built.asm["amdgcn"] if target == "gfx942" else built.asm["ptx"], target)
    shared = int(built.metadata.shared)
    bulk_copy = "cp.async.bulk.tensor" in built.asm.get("ptx", "")
    why = judge(spec, target, spills, shared, found)
    if spec.needs_bulk_copy and target == "sm_90" and not bulk_copy:
        why = why or "no bulk tensor copy"
    measured = {"registers": registers, "spills": spills, "shared_bytes": shared, "matrix_instructions": found}
    return result | measured | {"bulk_copy": bulk_copy, "ok": not why, "why": why}


def judge(spec: KernelSpec, target: str, spills: int, shared: int, found: list[str]) -> str:
    """What is wrong with a build, "" where nothing is."""
    if shared > SHARED_BYTES[target]:
        return f"shared memory of {shared} bytes is over the limit of {SHARED_BYTES[target]}"
    if not spec.needs_matrix_instruction:
        return ""
    if spills:
        return f"the main loop spills ({spills})"
    if not found:
        return "no matrix instruction"
    is_fp8 = any("fp8" in kind for kind in spec.signature.values())
    if is_fp8 and target == "sm_90" and "wgmma" not in found:
        return f"FP8 on sm_90 needs wgmma, found {', '.join(found)}"
    return ""


def compile_for(spec: KernelSpec, target: str) -> Any:
    """Triton's compiled kernel; pointers and `multiples` are divisible by 16, as torch's allocations are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget("hip", "gfx942", 64) if target == "gfx942" else GPUTarget("cuda", int(target[3:]), 32)
    signature = dict(spec.signature)
    divisible = [kind.startswith("*") or name in spec.multiples for name, kind in signature.items()]
    attrs = {(i,): [["tt.divisibility", 16]] for i, holds in enumerate(divisible) if holds}
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(source, target=gpu, options=options)


def matrix_instructions(assembly: str, target: str) -> list[str]:
    """Which matrix instructions PTX or gfx942 assembly holds, each named once."""
    if target == "gfx942":
        return sorted(set(re.findall(r"\bv_mfma_\w+", assembly)))
    return [name for name, pattern in MATRIX.items() if re.search(pattern, assembly)]


def _ptxas_usage(built: Any, target: str) -> tuple[int, int]:
    """(registers a thread, bytes of spill stores and loads) by the ptxas that Triton carries."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = built.asm["ptx"]
    stated = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(int(target[3:])).path, "-v", f"--gpu-name={stated[1] if stated else target}", file.name]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr}")
    return _sum(r"Used (\d+) registers", done.stderr), _sum(r"(\d+) bytes spill", done.stderr)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers a lane, spilled registers) from the metadata at the end of the assembly."""
    spilled = _sum(r"\.vgpr_spill_count:\s*(\d+)", assembly) + _sum(r"\.sgpr_spill_count:\s*(\d+)", assembly)
    return _sum(r"\.vgpr_count:\s*(\d+)", assembly), spilled


def _sum(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text))


def audit_tasks(job: dict[str, Any]) -> list[tuple[KernelSpec, str]]:
    """Of `crossdock audit`: the job has targets, parts of kernel names, and modules."""
    specs = find_specs(job["modules"])
    wanted = [spec for spec in specs if not job["kernels"] or any(part in spec.name for part in job["kernels"])]
    return [(spec, target) for spec in wanted for target in job["targets"] if target in spec.targets]


def build_tasks(job: dict[str, Any]) -> list[tuple[KernelSpec, str]]:
    """Of `crossdock tune`: the job has targets, and builds as tune_search.py names them."""
    from crossdock.cli.tune_search import build_spec

    specs = [spec for name in _kernel_modules() for spec in getattr(importlib.import_module(name), "AUDIT", [])]
    return [(build_spec(specs, build, target), target) for build in job["builds"] for target in job["targets"]]


def main() -> None:
    """Reads its job from stdin: what to compile, and which share is its own."""
    job = json.loads(sys.stdin.read())
    tasks = build_tasks(job) if "builds" in job else audit_tasks(job)
    print(json.dumps({"total": len(tasks)}), flush=True)
    for spec, target in tasks[job["shard"] :: job["of"]]:
        print(json.dumps(examine(spec, target)), flush=True)


if __name__ == "__main__":
    main()
