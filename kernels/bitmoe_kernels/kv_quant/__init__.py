"""Keys and values of attention in 3 or 4 bits, one scale per token and head."""

from bitmoe_kernels.kv_quant.op import dequantize_kv, packed_width, quantize_kv

__all__ = ["dequantize_kv", "packed_width", "quantize_kv"]
