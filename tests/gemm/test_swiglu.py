"""SwiGLU, alone and fused with quantisation, against float64 and against its parts; and its gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.gemm import dequantize_rows, quantize_rows, swiglu, swiglu_quantize

BACKENDS = ["torch", "triton"]
SHAPES = [(1, 1), (3, 128), (2, 300), (5, 1100), (1, 2048)]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, in the interpreter

ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # interpreted bf16 truncates


def gate_up(rows: int, inner: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 10007 + inner)
    x = torch.randn(rows, 2 * inner, generator=generator) * 4
    x[0, 0] = -95.0  # exp(95) is infinite in float32, silu is -0 there
    return x.to(dtype).to(device)


def exact(gate_up_R2F: Tensor) -> Tensor:
    gate_RF, up_RF = gate_up_R2F.double().chunk(2, -1)
    return F.silu(gate_RF) * up_RF


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.usefixtures("poison")
def test_against_float64(backend: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x_R2F = gate_up(*shape, dtype, device)
    out_RF = swiglu(x_R2F, backend=backend)
    assert out_RF.dtype == dtype and out_RF.shape == shape
    torch.testing.assert_close(out_RF.double(), exact(x_R2F), rtol=ROUNDING[dtype], atol=1e-7)
    assert torch.equal(out_RF, swiglu(x_R2F, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.usefixtures("poison")
def test_quantized_equals_its_parts(backend: str, shape: tuple[int, int], pow2: bool, device: torch.device) -> None:
    x_R2F = gate_up(*shape, torch.bfloat16, device)
    q_RF, scale_RB = swiglu_quantize(x_R2F, pow2=pow2, backend=backend)
    again = swiglu_quantize(x_R2F, pow2=pow2, backend=backend)
    assert torch.equal(q_RF.view(torch.uint8), again[0].view(torch.uint8)) and torch.equal(scale_RB, again[1])
    expected_q, expected_scale = quantize_rows(swiglu(x_R2F.float(), backend="torch"), pow2=pow2, backend="torch")
    torch.testing.assert_close(scale_RB, expected_scale, rtol=1e-6, atol=0)
    steps = (q_RF.view(torch.uint8) & 0x7F).int() - (expected_q.view(torch.uint8) & 0x7F).int()
    assert steps.abs().max() <= 1  # exp differs in its last bit, so a tie may fall to either side
    assert (steps != 0).sum() <= 0.001 * steps.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_from_the_unrounded_product(backend: str, device: torch.device) -> None:
    x_R2F = gate_up(16, 256, torch.bfloat16, device)
    back_RF = dequantize_rows(*swiglu_quantize(x_R2F, backend=backend)).double()
    rounded = dequantize_rows(*quantize_rows(swiglu(x_R2F, backend="torch"), backend="torch")).double()
    assert (back_RF - exact(x_R2F)).norm() < (rounded - exact(x_R2F)).norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_empty(backend: str, device: torch.device) -> None:
    wide = torch.randn(60, 12, device=device)
    for view in (wide[:, :8], wide.t(), wide[:0]):
        assert torch.equal(swiglu(view, backend=backend), swiglu(view.contiguous(), backend=backend))
        q_RF, _ = swiglu_quantize(view, backend=backend)
        expected, _ = swiglu_quantize(view.contiguous(), backend=backend)
        assert torch.equal(q_RF.view(torch.uint8), expected.view(torch.uint8))


def test_offsets_beyond_int32(device: torch.device) -> None:
    far = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)  # its pages stay untouched but for a few
    x_R2F = far.as_strided((3, 200), (2**30, 1))
    x_R2F.copy_(gate_up(3, 100, torch.bfloat16, device))
    assert torch.equal(swiglu(x_R2F, backend="triton"), swiglu(x_R2F.contiguous(), backend="triton"))
    q_RF, _ = swiglu_quantize(x_R2F, backend="triton")
    expected, _ = swiglu_quantize(x_R2F.contiguous(), backend="triton")
    assert torch.equal(q_RF.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_torch_rows_do_not_depend_on_their_company(dtype: torch.dtype, threads: int) -> None:
    """On a CPU, with sizes where threads would divide a row between them and rows end in half a vector."""
    x_R2F = torch.randn(701, 200).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole_RF = swiglu(x_R2F, backend="torch")
        transposed_RF = swiglu(x_R2F.t().contiguous().t(), backend="torch")
        alone_RF = torch.cat([swiglu(row[None], backend="torch") for row in x_R2F])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole_RF, alone_RF) and torch.equal(transposed_RF, alone_RF)


def test_gradient_in_float64() -> None:
    x_R2F = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: swiglu(x, backend="torch"), (x_R2F,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_gradient_against_float64(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    x_R2F = gate_up(5, 70, dtype, device).requires_grad_()
    dout_RF = torch.randn(5, 70, device=device).to(dtype)
    swiglu(x_R2F, backend=backend).backward(dout_RF)
    leaf_R2F = x_R2F.detach().double().requires_grad_()
    exact(leaf_R2F).backward(dout_RF.double())
    assert x_R2F.grad is not None and leaf_R2F.grad is not None and x_R2F.grad.dtype == dtype
    torch.testing.assert_close(x_R2F.grad.double(), leaf_R2F.grad, rtol=2 * ROUNDING[dtype], atol=1e-6)


def test_bad_arguments() -> None:
    for function in (swiglu, swiglu_quantize):
        with pytest.raises(ConfigError, match=r"gate_up_R2F must have 2 dimensions \[R, 2F\], found shape \(4,\)"):
            function(torch.zeros(4))
        with pytest.raises(ConfigError, match="even number of columns, gate and up, found 5"):
            function(torch.zeros(2, 5))
        with pytest.raises(ConfigError, match=r"gate_up_R2F must be .*, found torch.int64"):
            function(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"found torch.float64"):
        swiglu_quantize(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"found torch.float64"):
        swiglu(torch.zeros(2, 4, dtype=torch.float64), backend="triton")
