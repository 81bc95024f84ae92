# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""`router_gemm`: the router's product, in float32 whatever the model's dtype, each row independent of its company.

E is small and D long, so a few rows fill a GPU only when D is split. Every chunk of D is summed on its own, and chunks
are added in ascending order, in one of two ways that give the same bits:

    few rows:   a program per (row tile, expert tile, chunk) --> partials [S, T, E] --> the next kernel adds over S
    many rows:  a program per (row tile, expert tile) adds its chunks as it goes --> partials [1, T, E]

The next kernel is `sum_chunks_kernel` where logits are wanted, and the selection itself where only choices are
(`Router.forward`), which adds in the same order.

bfloat16 rows meet a float32 weight as three bfloat16 thirds of it (8 + 8 + 8 bits hold all 24), which matrix units
multiply exactly; widening the rows instead makes Triton 3.7 compile "ieee" to tf32 on sm_100, 13 bits short.

One row of DeepSeek-V3 makes 4 expert tiles x 28 chunks = 112 programs.

Rejected: atomic adds (order changes between runs); a chunk length or tile shape that depends on T (then a row's bits
might too, as matrix instructions of other shapes may add in another order: narrower tiles would make more programs
where E is 128, but with wgmma n16 or n32 for n64, and 16 wide with mfma 16x16 for 32x32). torch's own sum over S would
have that fault.

Legend: T tokens on this rank, D hidden, E logical experts, S chunks of D.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from crossdock._audit_spec import KernelSpec
from crossdock._triton import interpreting, tl, triton
from crossdock.backend import Backend, resolve_backend
from crossdock.linear import linear
from crossdock.routing.checks import check_product

BLOCK_T, BLOCK_E = 64, 64
CHUNK = 256  # several BLOCK_D long: a product of one step could be fused with the addition of chunks in one kernel only
SPLIT_BELOW = 96  # tiles of [T, E] from which a GPU is full without splitting D
SUM_BLOCK = 256


def router_gemm(x_TD: Tensor, w_ED: Tensor, backend: Backend = "auto") -> Tensor:
    """x @ w^T in float32: [T, D] x [E, D] -> [T, E] float32, differentiable; a row's bits do not depend on T.

    x and w are float32, bfloat16 or float16, each of its own. Raises ConfigError where they do not fit together.
    """
    check_product(x_TD, w_ED)
    return router_logits(x_TD, w_ED, resolve_backend(backend, x_TD.device))


def router_logits(x_TD: Tensor, w_ED: Tensor, backend: Literal["torch", "triton"]) -> Tensor:
    """`router_gemm` of operands already checked."""
    if backend == "torch":
        return router_gemm_ref(x_TD, w_ED)
    out_TE: Tensor = _RouterGemm.apply(x_TD, w_ED)  # type: ignore[no-untyped-call]
    return out_TE


def router_gemm_ref(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """`router_gemm` in torch operations: the specification, and the path for tensors on a CPU."""
    return linear(x_TD.float(), w_ED.float())


class _RouterGemm(torch.autograd.Function):
    """The kernels forward, two float32 products backward."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_ED)
        return router_gemm_triton(x_TD, w_ED)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> Any:
        x_TD, w_ED = ctx.saved_tensors
        grad_x = (grad_TE @ w_ED.float()).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (grad_TE.T @ x_TD.float()).to(w_ED.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def router_gemm_kernel(
    x,
    w,
    out,
    T,
    E,
    D,
    stride_x,
    stride_w,
    SPLIT: tl.constexpr,
    THIRDS: tl.constexpr,
    ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    EVEN: tl.constexpr,  # D is a multiple of CHUNK
    WIDEN: tl.constexpr,  # the interpreter multiplies bf16's bit patterns, so it gets float32
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """SPLIT: program (t, e, s) writes chunk s to out[s]; otherwise program (t, e) writes the sum of all to out[0].

    THIRDS: x is bfloat16 and w float32; otherwise both have one type, and 16-bit types' products are exact in float32.
    """
    # Rows and columns past the end read the last one again, which costs no mask; they are never stored.
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inner = tl.arange(0, BLOCK_D)
    x_ptrs = x + tl.minimum(row, T - 1)[:, None] * stride_x + inner[None, :]
    w_ptrs = w + tl.minimum(col, E - 1).to(tl.int64)[None, :] * stride_w + inner[:, None]
    if ALIGNED:
        x_ptrs = tl.multiple_of(x_ptrs, (16, 16))
        w_ptrs = tl.multiple_of(w_ptrs, (16, 16))
    first = tl.program_id(2)
    last = first + 1 if SPLIT else tl.cdiv(D, CHUNK)
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for chunk in range(first, last):
        acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for step in range(0, CHUNK, BLOCK_D):
            d = chunk * CHUNK + step
            if EVEN:
                a = tl.load(x_ptrs + d)
                b = tl.load(w_ptrs + d)
            else:
                a = tl.load(x_ptrs + d, mask=inner[None, :] < D - d, other=0.0)
                b = tl.load(w_ptrs + d, mask=inner[:, None] < D - d, other=0.0)
            if THIRDS:
                high = b.to(tl.bfloat16)
                rest = b - high.to(tl.float32)
                middle = rest.to(tl.bfloat16)
                low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
                acc = _dot(a, low, acc, WIDEN)
                acc = _dot(a, middle, acc, WIDEN)
                acc = _dot(a, high, acc, WIDEN)
            else:
                acc = _dot(a, b, acc, WIDEN)
        total += acc
    to = out + (first * T + row)[:, None] * E + col[None, :]
    tl.store(to, total, mask=(row < T)[:, None] & (col < E)[None, :])


@triton.jit
def sum_chunks_kernel(partials, out, size, S, BLOCK: tl.constexpr):
    """out[i] = partials[0, i] + partials[1, i] + ..., in this order; `size` numbers in each of S chunks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(S):
        total += tl.load(partials + at, mask=at < size, other=0.0)
        partials += size
    tl.store(out + at, total, mask=at < size)


def router_gemm_triton(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """`router_gemm` without gradient: one launch for many rows, two for few."""
    partials_STE = router_partials(x_TD, w_ED)
    chunks, rows, experts = partials_STE.shape
    if chunks == 1:
        return partials_STE[0]
    out_TE = torch.empty(rows, experts, dtype=torch.float32, device=x_TD.device)
    size = rows * experts
    sum_chunks_kernel[(triton.cdiv(size, SUM_BLOCK),)](partials_STE, out_TE, size, chunks, SUM_BLOCK)
    return out_TE


def router_partials(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """Float32 [S, T, E] whose sum over S, taken in ascending order, is `router_gemm`: one launch.

    S is 1 where there are tiles enough to fill a GPU. Operands whose two dtypes no kernel multiplies, or whose rows
    are not contiguous, are converted first, which is a launch more.
    """
    (rows, inner), experts = x_TD.shape, w_ED.shape[0]
    thirds = x_TD.dtype == torch.bfloat16 and w_ED.dtype == torch.float32
    if x_TD.dtype != w_ED.dtype and not thirds:
        x_TD, w_ED = x_TD.float(), w_ED.float()
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    w_ED = w_ED if w_ED.stride(1) == 1 else w_ED.contiguous()
    tiles = triton.cdiv(rows, BLOCK_T), triton.cdiv(experts, BLOCK_E)
    chunks = max(1, triton.cdiv(inner, CHUNK)) if 0 < tiles[0] * tiles[1] < SPLIT_BELOW else 1
    out_STE = torch.empty(chunks, rows, experts, dtype=torch.float32, device=x_TD.device)
    if rows == 0:
        return out_STE
    router_gemm_kernel[(*tiles, chunks)](
        x_TD,
        w_ED,
        out_STE,
        rows,
        experts,
        inner,
        x_TD.stride(0),
        w_ED.stride(0),
        SPLIT=chunks > 1,
        THIRDS=thirds,
        ALIGNED=_is_aligned(x_TD) and _is_aligned(w_ED),
        EVEN=inner % CHUNK == 0,
        WIDEN=interpreting() and x_TD.dtype == torch.bfloat16,
        **_tile(wide=x_TD.dtype == torch.float32),
        num_warps=4,
        num_stages=3,
    )
    return out_STE


def _tile(wide: bool) -> dict[str, int]:
    """Tile sizes, by dtype alone; float32 has no matrix unit and needs registers for both operands."""
    return {"CHUNK": CHUNK, "BLOCK_T": BLOCK_T, "BLOCK_E": BLOCK_E, "BLOCK_D": 16 if wide else 64}


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _gemm_spec(x: str, w: str, split: bool) -> KernelSpec:
    flags: dict[str, Any] = {"SPLIT": split, "THIRDS": x != w, "ALIGNED": True, "EVEN": True, "WIDEN": False}
    flags |= _tile(wide=x == "fp32")
    types = {"x": f"*{x}", "w": f"*{w}", "out": "*fp32"} | dict.fromkeys(("T", "E", "D", "stride_x", "stride_w"), "i32")
    return KernelSpec(
        name="router_gemm",
        kernel=router_gemm_kernel,
        config=f"x {x}, w {w}, {'split' if split else 'whole'} D, tile {BLOCK_T}x{BLOCK_E}",
        signature=types | dict.fromkeys(flags, "constexpr"),
        constexprs=flags,
        num_warps=4,
        num_stages=3,
        needs_matrix_instruction=x != "fp32",
    )


AUDIT: list[KernelSpec] = [
    _gemm_spec("bf16", "bf16", split=True),
    _gemm_spec("bf16", "bf16", split=False),
    _gemm_spec("bf16", "fp32", split=True),
    _gemm_spec("bf16", "fp32", split=False),
    _gemm_spec("fp32", "fp32", split=True),
    _gemm_spec("fp32", "fp32", split=False),
    KernelSpec(
        name="router_gemm_sum",
        kernel=sum_chunks_kernel,
        config=f"BLOCK={SUM_BLOCK}",
        signature={"partials": "*fp32", "out": "*fp32", "size": "i32", "S": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": SUM_BLOCK},
    ),
]
