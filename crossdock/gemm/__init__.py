"""Quantisation, grouped products and SwiGLU: everything an expert computes; knows no ranks."""

from crossdock.gemm.grouped import grouped_gemm, grouped_gemm_fp8
from crossdock.gemm.quant import (
    BLOCK,
    E4M3_MAX,
    QuantSpec,
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)
from crossdock.gemm.swiglu import swiglu, swiglu_quantize

__all__ = [
    "BLOCK",
    "E4M3_MAX",
    "QuantSpec",
    "dequantize_blocks",
    "dequantize_rows",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "quantize_blocks",
    "quantize_rows",
    "swiglu",
    "swiglu_quantize",
]
