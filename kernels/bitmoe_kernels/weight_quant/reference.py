"""Absmean ternary weight quantization in plain torch: the truth for every other implementation.

The mean of |W| is summed in fp64 and rounded to fp32 once, so that neither the order of the sum nor its split
over ranks shows in the scale. It comes in three steps, because ranks that share a group add up their sums
between the first and the second. Arguments are not validated here: op.py does that.
"""

# Shapes: O = output rows, I = input columns, G = quantization groups; "..." = any batch, such as experts.

import torch

MIN_SCALE = 1e-5


def absmean_sums_reference(w_OI: torch.Tensor, groups: int, axis: int) -> torch.Tensor:
    """Sum of |w| per group, fp64 [..., G]; ``axis`` is -2 (groups of rows) or -1 (groups of columns)."""
    other_axis = -3 - axis
    sums = w_OI.abs().sum(dim=other_axis, dtype=torch.float64)  # [..., O] or [..., I]
    return sums.unflatten(-1, (groups, sums.shape[-1] // groups)).sum(dim=-1)


def absmean_scale_reference(sums_G: torch.Tensor, count: int) -> torch.Tensor:
    """Scale fp32 [..., G] from fp64 sums over ``count`` values each; NaN where it is not finite."""
    # A tensor as divisor: CUDA turns division by a Python number into a product with its rounded reciprocal.
    mean_G = (sums_G / torch.full_like(sums_G, count)).float()
    return mean_G.clamp(min=MIN_SCALE).masked_fill(~mean_G.isfinite(), float("nan"))


def ternary_codes_reference(w_OI: torch.Tensor, scale_G: torch.Tensor, axis: int) -> torch.Tensor:
    """Codes int8 [..., O, I] in {-1, 0, 1}; 0 where the scale is NaN."""
    other_axis = -3 - axis
    scale = scale_G.repeat_interleave(w_OI.shape[axis] // scale_G.shape[-1], dim=-1).unsqueeze(other_axis)
    return (w_OI.float() / scale).round().clamp(-1, 1).nan_to_num(nan=0.0).to(torch.int8)
