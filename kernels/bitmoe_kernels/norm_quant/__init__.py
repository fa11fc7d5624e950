"""RMSNorm and sub-norm, with the quantization of their result in one read and one write; and their backward."""

from bitmoe_kernels.norm_quant.op import (
    rms_norm,
    rms_norm_backward,
    rms_norm_quantize,
    sub_norm_backward,
    sub_norm_quantize,
)

__all__ = ["rms_norm", "rms_norm_backward", "rms_norm_quantize", "sub_norm_backward", "sub_norm_quantize"]
