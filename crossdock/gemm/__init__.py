"""Quantisation, grouped products and SwiGLU: everything an expert computes; knows no ranks."""

from crossdock.gemm.dense import dense_gemm, dense_swiglu
from crossdock.gemm.grouped import grouped_gemm, grouped_gemm_masked, grouped_swiglu
from crossdock.gemm.grouped_fp8 import (
    grouped_gemm_fp8,
    grouped_gemm_fp8_masked,
    grouped_gemm_fp8_rowwise,
    grouped_swiglu_fp8,
)
from crossdock.gemm.linear_fp8 import Codes, Rows, dense_swiglu_fp8, linear_fp8
from crossdock.gemm.quant import (
    BLOCK,
    E4M3_MAX,
    QuantSpec,
    dequantize_blocks,
    dequantize_rows,
    dequantize_whole_rows,
    quantize_blocks,
    quantize_rows,
    quantize_whole_rows,
)
from crossdock.gemm.rms_norm import QuantizedNorm, rms_norm, rms_norm_quantize
from crossdock.gemm.swiglu import swiglu, swiglu_quantize

__all__ = [
    "BLOCK",
    "E4M3_MAX",
    "Codes",
    "QuantSpec",
    "QuantizedNorm",
    "Rows",
    "dense_gemm",
    "dense_swiglu",
    "dense_swiglu_fp8",
    "dequantize_blocks",
    "dequantize_rows",
    "dequantize_whole_rows",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_masked",
    "grouped_gemm_fp8_rowwise",
    "grouped_gemm_masked",
    "grouped_swiglu",
    "grouped_swiglu_fp8",
    "linear_fp8",
    "quantize_blocks",
    "quantize_rows",
    "quantize_whole_rows",
    "rms_norm",
    "rms_norm_quantize",
    "swiglu",
    "swiglu_quantize",
]
