"""Low-bit activations, one scale per token (and group of features): INT4, INT8 and FP4 (E2M1)."""

from bitmoe_kernels.act_quant.op import dequantize, int8_codes, int8_scale, quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.act_quant.reference import NEIGHBOURS, wide_sum

__all__ = [
    "NEIGHBOURS",
    "dequantize",
    "int8_codes",
    "int8_scale",
    "quantize_fp4",
    "quantize_int4",
    "quantize_int8",
    "wide_sum",
]
