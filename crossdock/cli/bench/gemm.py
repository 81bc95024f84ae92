"""`bench gemm`: the grouped product against F.grouped_mm and a loop of F.linear, one call an expert.

Legend: R rows, L groups, N output columns, K inner size.
"""

from typing import Any

from crossdock.cli.bench.report import AsJson, Device, DtypeOption, Plot, check_plot, choose, deliver, progress

CPU_SHAPE, GPU_SHAPE = (32, 768, 1024), (64, 4096, 7168)  # L, N, K
ROWS = (8, 64, 512, 4096)


def gemm(device: Device = None, dtype: DtypeOption = None, plot: Plot = None, as_json: AsJson = False) -> None:
    """Grouped product, beside F.grouped_mm and a loop of F.linear."""
    check_plot(plot)
    from dataclasses import asdict

    import torch

    from crossdock.cli.bench.timing import measure_ceilings

    chosen, compute = choose(device, dtype)
    ceilings = measure_ceilings(chosen, compute)
    torch.manual_seed(0)
    groups, columns, inner = GPU_SHAPE if chosen.type == "cuda" else CPU_SHAPE
    weights_LNK = torch.randn(groups, columns, inner, device=chosen).div_(inner**0.5).to(compute)
    with torch.no_grad():
        cases = [_case(rows, weights_LNK, ceilings) for rows in progress(ROWS, "grouped product")]
    deliver({"ceilings": asdict(ceilings), "cases": cases}, "grouped product", as_json, plot)


def _case(rows: int, weights_LNK: Any, ceilings: Any) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from crossdock.cli.bench.timing import compare
    from crossdock.gemm import grouped_gemm

    device, (groups, columns, inner) = weights_LNK.device, weights_LNK.shape
    rows_RK = torch.randn(rows, inner, device=device).to(weights_LNK.dtype)
    counts = torch.bincount(torch.randint(groups, (rows,)), minlength=groups)
    ends_L = counts.cumsum(0).to(torch.int32).to(device)
    bounds = [0, *ends_L.tolist()]
    spans = [(group, bounds[group], bounds[group + 1]) for group in range(groups) if bounds[group + 1] > bounds[group]]
    contenders = {
        "crossdock": lambda: grouped_gemm(rows_RK, weights_LNK, ends_L),
        "linear_loop": lambda: torch.cat([F.linear(rows_RK[b:e], weights_LNK[g]) for g, b, e in spans]),
    }
    if hasattr(F, "grouped_mm"):
        contenders["grouped_mm"] = lambda: F.grouped_mm(rows_RK, weights_LNK.transpose(1, 2), offs=ends_L)
    took = compare(contenders, device)
    seconds, operations = took.pop("crossdock"), 2.0 * rows * columns * inner
    element = weights_LNK.element_size()
    moved = element * (rows * inner + len(spans) * columns * inner + rows * columns)
    return {
        "case": f"R={rows} L={groups} N={columns} K={inner} {str(weights_LNK.dtype).removeprefix('torch.')}",
        "device": str(device),
        "us": seconds * 1e6,
        "tflops": operations / seconds / 1e12,
        "gbytes_per_s": moved / seconds / 1e9,
        "of_ceiling": ceilings.share(operations, moved, seconds),
        "ratio": {peer: other / seconds for peer, other in took.items()},
    }
