"""RMSNorm and quantization of its result in one read and one write."""

from bitmoe_kernels.norm_quant.op import rms_norm_quantize, sub_norm_quantize

__all__ = ["rms_norm_quantize", "sub_norm_quantize"]
