"""One grouped product with its inputs, its peers and its specification: what `bench gemm` measures and `tune` searches.

Inputs are random, because constant data lets a GPU run faster than it can. Groups get random shares of the rows, as
tokens give them, from a fixed seed. FP8 codes are drawn as they are, with scales beside them that span decades: nothing
of float32 size is made on the way, as all experts of a layer may stand on one device.

Legend: R rows, L groups, N output columns, K inner size, F inner size of an expert, B blocks of 128.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.backend import Backend
from crossdock.gemm import (
    dequantize_blocks,
    dequantize_rows,
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_gemm_fp8_rowwise,
    grouped_swiglu,
    grouped_swiglu_fp8,
    swiglu,
    swiglu_quantize,
)
from crossdock.gemm.configs import ELEMENT_BYTES, Problem
from crossdock.gemm.grouped_fp8_kernel import grouped_gemm_fp8_ref, grouped_gemm_fp8_triton
from crossdock.gemm.grouped_kernel import grouped_gemm_ref, grouped_gemm_triton
from crossdock.gemm.swiglu_kernel import swiglu_quantize_ref, swiglu_ref

BLOCK = 128
Call = Callable[[], Any]


@dataclass
class Product:
    """`call` is crossdock's, `reference` the specification, `peers` other ways to it; none takes an argument."""

    problem: Problem
    call: Call
    reference: Call
    operations: float
    moved_bytes: float
    peers: dict[str, Call] = field(default_factory=dict)


def make(problem: Problem, device: torch.device, backend: Backend = "auto") -> Product:
    """The product with inputs on `device`; peers that cannot run there raise when called."""
    base, fused = problem.kind.removesuffix("_swiglu"), problem.kind.endswith("_swiglu")
    generator = torch.Generator(device).manual_seed(0)
    ends_L, spans = _groups(problem, device)
    columns = problem.columns * (2 if fused else 1)
    build = _fp8 if base.startswith("fp8") else _float
    call, reference, peers = build(problem, columns, ends_L, spans, generator, backend)
    size, rows = ELEMENT_BYTES[base], problem.rows
    out = rows * problem.columns * (1 if fused and size == 1 else max(size, 2))
    read = size * problem.inner * (rows + len(spans) * columns)
    return Product(problem, call, reference, 2.0 * rows * columns * problem.inner, read + out, peers)


def _groups(problem: Problem, device: torch.device) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Ends of groups that take rows at random, and (group, first row, end row) of those that got some."""
    chosen_R = torch.randint(problem.groups, (problem.rows,), generator=torch.Generator().manual_seed(0))
    ends_L = torch.bincount(chosen_R, minlength=problem.groups).cumsum(0).to(torch.int32)
    bounds = [0, *ends_L.tolist()]
    spans = [(g, b, e) for g, (b, e) in enumerate(pairwise(bounds)) if e > b]
    return ends_L.to(device), spans


def _float(problem: Problem, columns: int, ends_L: Tensor, spans: Any, generator: Any, backend: Backend) -> Any:
    dtype = torch.float32 if problem.kind.startswith("fp32") else torch.bfloat16
    device, inner = ends_L.device, problem.inner
    rows_RK = torch.randn(problem.rows, inner, device=device, generator=generator, dtype=dtype)
    weights_LNK = torch.empty(problem.groups, columns, inner, device=device, dtype=dtype)
    weights_LNK.normal_(std=inner**-0.5, generator=generator)
    if problem.kind.endswith("_swiglu"):
        return (
            lambda: grouped_swiglu(rows_RK, weights_LNK, ends_L, backend=backend),
            lambda: swiglu_ref(grouped_gemm_ref(rows_RK, weights_LNK, ends_L)),
            {"two_launches": lambda: swiglu(grouped_gemm(rows_RK, weights_LNK, ends_L, backend), backend)},
        )
    peers: dict[str, Call] = {"linear_loop": _loop(rows_RK, weights_LNK, spans)}
    if device.type != "cpu":  # what Hopper's own kernel is worth
        peers["portable"] = lambda: grouped_gemm_triton(rows_RK, weights_LNK, ends_L)
    if hasattr(F, "grouped_mm"):
        peers["grouped_mm"] = lambda: F.grouped_mm(rows_RK, weights_LNK.transpose(1, 2), offs=ends_L)
    return (
        lambda: grouped_gemm(rows_RK, weights_LNK, ends_L, backend),
        lambda: grouped_gemm_ref(rows_RK, weights_LNK, ends_L),
        peers,
    )


def _loop(rows_RK: Tensor, weights_LNK: Tensor, spans: Any) -> Call:
    """One product a group by the vendor's BLAS, into one output, with bounds that the host knows."""
    out_RN = rows_RK.new_empty(rows_RK.shape[0], weights_LNK.shape[1])

    def call() -> Tensor:
        for group, start, end in spans:
            torch.mm(rows_RK[start:end], weights_LNK[group].t(), out=out_RN[start:end])
        return out_RN

    return call


def _fp8(problem: Problem, columns: int, ends_L: Tensor, spans: Any, generator: Any, backend: Backend) -> Any:
    device, inner, groups = ends_L.device, problem.inner, problem.groups
    q_RK = _codes((problem.rows, inner), device, generator)
    wq_LNK = torch.stack([_codes((columns, inner), device, generator) for _ in range(groups)])
    blocks = -(-inner // BLOCK)
    bf16 = torch.bfloat16
    if problem.kind == "fp8_row":
        scale_R, wscale_LN = _scales((problem.rows,), device, generator), _scales((groups, columns), device, generator)
        return (
            lambda: grouped_gemm_fp8_rowwise(q_RK, scale_R, wq_LNK, wscale_LN, ends_L, backend=backend),
            lambda: grouped_gemm_fp8_ref(q_RK, scale_R, wq_LNK, wscale_LN, ends_L, bf16),
            _row_peers(q_RK, scale_R, wq_LNK, wscale_LN, ends_L, spans)
            | _portable(q_RK, scale_R, wq_LNK, wscale_LN, ends_L),
        )
    scale_RB = _scales((problem.rows, blocks), device, generator)
    wscale_LBB = _scales((groups, -(-columns // BLOCK), blocks), device, generator)
    arguments = (q_RK, scale_RB, wq_LNK, wscale_LBB, ends_L)
    if problem.kind == "fp8_block_swiglu":
        return (
            lambda: grouped_swiglu_fp8(*arguments, backend=backend),
            lambda: swiglu_quantize_ref(grouped_gemm_fp8_ref(*arguments, bf16), pow2=False),
            {"two_launches": lambda: swiglu_quantize(grouped_gemm_fp8(*arguments, backend=backend), backend=backend)},
        )
    return (
        lambda: grouped_gemm_fp8(*arguments, backend=backend),
        lambda: grouped_gemm_fp8_ref(*arguments, bf16),
        {"linear_loop_bf16": _dequantized_loop(*arguments, spans), "scaled_mm_loop": _block_loop(*arguments, spans)}
        | _portable(*arguments),
    )


def _portable(q_RK: Tensor, scale: Tensor, wq_LNK: Tensor, wscale: Tensor, ends_L: Tensor) -> dict[str, Call]:
    """The kernel that every GPU has, beside Hopper's own; none on a CPU, which would interpret it."""
    if q_RK.device.type == "cpu":
        return {}
    return {"portable": lambda: grouped_gemm_fp8_triton(q_RK, scale, wq_LNK, wscale, ends_L, torch.bfloat16)}


def _codes(shape: tuple[int, ...], device: torch.device, generator: Any) -> Tensor:
    return torch.randn(shape, device=device, generator=generator).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)


def _scales(shape: tuple[int, ...], device: torch.device, generator: Any) -> Tensor:
    """Positive float32 that span three decades, small enough for sums over K to stay in range."""
    return 10.0 ** (torch.rand(shape, device=device, generator=generator) * 3 - 5)


def _dequantized_loop(q_RK: Tensor, scale_RB: Tensor, wq: Tensor, wscale: Tensor, ends_L: Tensor, spans: Any) -> Call:
    """What the vendor's BLAS does in bfloat16; multiplying out the codes is not timed."""
    made: list[Call] = []

    def call() -> Tensor:
        if not made:
            weights_LNK = torch.stack([dequantize_blocks(*both, torch.bfloat16) for both in zip(wq, wscale)])  # noqa: B905
            made.append(_loop(dequantize_rows(q_RK, scale_RB, torch.bfloat16), weights_LNK, spans))
        out: Tensor = made[0]()
        return out

    return call


def _block_loop(q_RK: Tensor, scale_RB: Tensor, wq: Tensor, wscale: Tensor, ends_L: Tensor, spans: Any) -> Call:
    """torch._scaled_mm a group with the same scales, of which it wants the rows' next to one another."""
    scales = [scale_RB[start:end].t().contiguous().t() for _, start, end in spans]

    def call() -> list[Tensor]:
        return [
            torch._scaled_mm(q_RK[b:e], wq[g].t(), scale, wscale[g].t(), out_dtype=torch.bfloat16)
            for (g, b, e), scale in zip(spans, scales, strict=True)
        ]

    return call


def _row_peers(
    q_RK: Tensor, scale_R: Tensor, wq_LNK: Tensor, wscale_LN: Tensor, ends_L: Tensor, spans: Any
) -> dict[str, Call]:
    """torch's own products with one scale a row and a column, in one launch and in one a group."""

    def grouped() -> Any:
        functional: Any = F
        by_row, w_LKN = functional.ScalingType.RowWise, wq_LNK.transpose(1, 2)
        return functional.scaled_grouped_mm(q_RK, w_LKN, scale_R, by_row, wscale_LN, by_row, offs=ends_L)

    def loop() -> list[Tensor]:
        return [
            torch._scaled_mm(q_RK[b:e], wq_LNK[g].t(), scale_R[b:e, None], wscale_LN[g][None], out_dtype=torch.bfloat16)
            for g, b, e in spans
        ]

    return {"scaled_grouped_mm": grouped, "scaled_mm_loop": loop}
