"""Ternary weights: absmean scales and codes in {-1, 0, 1}."""

from bitmoe_kernels.weight_quant.op import absmean_scale, absmean_sums, ternarize, ternary_codes

__all__ = ["absmean_scale", "absmean_sums", "ternarize", "ternary_codes"]
