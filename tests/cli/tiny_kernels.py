"""Two kernels of a few lines for the audit's own tests: one is as it should be, one has lost its matrix product."""

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton


@triton.jit
def scale_kernel(x_ptr, y_ptr, size, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size) * factor, mask=at < size)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


_SCALE = {"x_ptr": "*fp32", "y_ptr": "*fp32", "size": "i32", "factor": "fp32", "BLOCK": "constexpr"}
_PRODUCT = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "BLOCK": "constexpr"}

AUDIT = [
    KernelSpec("tiny_scale", scale_kernel, "BLOCK=256", _SCALE, {"BLOCK": 256}),
    KernelSpec("tiny_product", product_kernel, "BLOCK=64", _PRODUCT, {"BLOCK": 64}, needs_matrix_instruction=True),
    KernelSpec("tiny_lost", scale_kernel, "BLOCK=256", _SCALE, {"BLOCK": 256}, needs_matrix_instruction=True),
]
