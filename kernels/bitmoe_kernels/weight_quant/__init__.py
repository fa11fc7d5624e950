"""Ternary weights: absmean scales and codes in {-1, 0, 1}."""

from bitmoe_kernels.weight_quant.op import (
    TernaryOperands,
    absmean_operands,
    absmean_scale,
    absmean_sums,
    absmean_sums_by_id,
    ternarize,
    ternary_codes,
    ternary_operands,
)

__all__ = [
    "TernaryOperands",
    "absmean_operands",
    "absmean_scale",
    "absmean_sums",
    "absmean_sums_by_id",
    "ternarize",
    "ternary_codes",
    "ternary_operands",
]
