"""Squared-ReLU gated linear unit, the activation of BitNet a4.8's feed-forward."""

from bitmoe_kernels.relu2_glu.op import relu2_glu

__all__ = ["relu2_glu"]
