"""`bench gemm`: grouped products of production models, beside torch's grouped products, the vendor's BLAS and the torch
reference.

On a GPU: both products of each model of shapes.py, on one rank of a node, while decoding (32 rows an expert, where the
weights' stream is the limit) and in prefill (4096 rows an expert, where the matrix units are); the two DeepSeek-like
ones also decode with all experts on one device. On a CPU smaller shapes, which end within a minute.

Legend: R rows, L groups, N output columns, K inner size.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.cli.bench.report import AsJson, Device, DtypeOption, Plot, check_plot, choose, deliver, progress
from crossdock.cli.shapes import MODELS, SPREAD, products
from crossdock.errors import ConfigError

if TYPE_CHECKING:
    from crossdock.gemm.configs import Kind, Problem

GPU_KINDS: "tuple[Kind, ...]" = ("bf16", "fp8_block", "fp8_row", "bf16_swiglu", "fp8_block_swiglu")
ROWS_PER_GROUP = {"decode": 32, "prefill": 4096}
ALL_EXPERTS, ALL_EXPERTS_TOKENS = ("deepseek-v3", "kimi-k2"), 64
CPU_SHAPE, ROWS = (32, 768, 1024), (8, 64, 512, 4096)  # L, N, K; R
CPU_FP8_SHAPE, FP8_ROWS = (8, 256, 512), (8, 64)
MEMORY_SHARE = 0.7  # of what is free on a GPU, for a case's inputs


def gemm(
    device: Device = None,
    dtype: DtypeOption = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind: bf16, fp8_block, fp8_row, ... (repeatable).")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model, on a GPU (repeatable).")] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Grouped products, beside F.grouped_mm, F.scaled_grouped_mm, the vendor's BLAS and the torch reference."""
    check_plot(plot)
    for name in model or ():
        if name not in MODELS:
            raise ConfigError(f"--model must be one of {', '.join(MODELS)}, found {name!r}")
    from dataclasses import asdict

    import torch

    from crossdock.cli.bench.timing import measure_ceilings

    chosen, compute = choose(device, dtype)
    on_gpu = chosen.type == "cuda"
    planned = list(_gpu_cases(model or list(MODELS)) if on_gpu else _cpu_cases(compute))
    planned = [case for case in planned if not kind or case[1].kind in kind]
    if not planned:
        raise ConfigError(f"no case is of kind {' or '.join(kind or ())} on {chosen.type}")
    ceilings = measure_ceilings(chosen, compute)
    left_out: dict[str, str] = {}
    with torch.no_grad():
        cases = [_case(name, problem, chosen, ceilings, left_out) for name, problem in progress(planned, "products")]
    result = {"ceilings": asdict(ceilings), "left_out": left_out, "cases": [case for case in cases if case]}
    deliver(result, "grouped products", as_json, plot)
    if any("crossdock" in name for name in left_out):  # one case's failure does not cost the others their figures
        raise typer.Exit(1)


def _gpu_cases(models: list[str]) -> "Iterator[tuple[str, Problem]]":
    from crossdock.gemm.configs import Problem

    for name in models:
        model = MODELS[name]
        for kind in GPU_KINDS:
            for product in products(kind):
                shape, slots = model.shape(product, kind), model.experts // SPREAD
                for regime, rows in ROWS_PER_GROUP.items():
                    yield f"{name} {product} {regime}", Problem(kind, rows * slots, slots, *shape)
                if name in ALL_EXPERTS:
                    rows = ALL_EXPERTS_TOKENS * model.top_k
                    yield f"{name} {product} decode, all experts", Problem(kind, rows, model.experts, *shape)


def _cpu_cases(dtype: Any) -> "Iterator[tuple[str, Problem]]":
    from crossdock.gemm.configs import Problem

    groups, *shape = CPU_SHAPE
    plain: Kind = "bf16" if str(dtype) == "torch.bfloat16" else "fp32"
    fused: Kind = "bf16_swiglu" if plain == "bf16" else "fp32_swiglu"
    for rows in ROWS:
        yield "product", Problem(plain, rows, groups, *shape)
    for rows in FP8_ROWS:
        yield "product and SwiGLU", Problem(fused, rows, groups, shape[0] // 2, shape[1])
    groups, *shape = CPU_FP8_SHAPE
    for rows in FP8_ROWS:
        yield "product", Problem("fp8_block", rows, groups, *shape)
        yield "product", Problem("fp8_row", rows, groups, *shape)


def _case(name: str, problem: "Problem", device: Any, ceilings: Any, left_out: dict[str, str]) -> dict[str, Any]:
    """One line of the result; none where the device has no room for it or our product fails."""
    from crossdock.cli.bench.products import make
    from crossdock.cli.bench.timing import comparable, compare

    case = f"{name}, {problem.kind} R={problem.rows} L={problem.groups} N={problem.columns} K={problem.inner}"
    if not _fits(problem, device):
        left_out[case] = "not enough free memory"
        return {}
    product = make(problem, device)
    able, missing = comparable({"crossdock": product.call} | product.peers | {"reference": product.reference})
    left_out.update({f"{problem.kind} {contender}": why for contender, why in missing.items()})
    if "crossdock" in missing:
        return {}
    took = compare(able, device)
    seconds = took.pop("crossdock")
    return {
        "case": case,
        "device": str(device),
        "us": seconds * 1e6,
        "tflops": product.operations / seconds / 1e12,
        "gbytes_per_s": product.moved_bytes / seconds / 1e9,
        "of_ceiling": ceilings.share(
            product.operations, product.moved_bytes, seconds, fp8=problem.kind.startswith("fp8")
        ),
        "ratio": {peer: other / seconds for peer, other in took.items()},
        "eager": list(took.eager) or None,
    }


def _fits(problem: "Problem", device: Any) -> bool:
    """Whether the inputs, the peers' copies of them and the outputs fit a GPU's free memory."""
    if device.type != "cuda":
        return True
    import torch

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    halves = 2 if problem.kind.endswith("_swiglu") else 1
    weights = problem.groups * problem.columns * halves * problem.inner
    rows = problem.rows * (problem.inner + 2 * halves * problem.columns)
    return bool(
        3.5 * weights + 12 * rows < MEMORY_SHARE * free
    )  # bytes: codes and a bf16 copy, or bf16 and a float32 row
