"""Low-bit activations, one scale per token (and group of features): INT4, INT8 and FP4 (E2M1)."""

from bitmoe_kernels.act_quant.op import dequantize, int8_codes, int8_scale, quantize_fp4, quantize_int4, quantize_int8

__all__ = ["dequantize", "int8_codes", "int8_scale", "quantize_fp4", "quantize_int4", "quantize_int8"]
