"""Squared-ReLU gated linear unit, the activation of BitNet a4.8's feed-forward, alone or with its quantizer."""

from bitmoe_kernels.relu2_glu.op import (
    relu2_glu,
    relu2_glu_quantize,
    relu2_glu_quantize_backward,
    relu2_glu_quantize_backward_codes,
)

__all__ = [
    "relu2_glu",
    "relu2_glu_quantize",
    "relu2_glu_quantize_backward",
    "relu2_glu_quantize_backward_codes",
]
