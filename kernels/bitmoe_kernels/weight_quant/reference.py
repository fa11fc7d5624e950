"""Absmean ternary weight quantization in plain torch: the truth for every other implementation.

The mean of |W| is summed in fp64 and rounded to fp32 once, so that neither the order of the sum nor its split
over ranks shows in the scale. It comes in three steps, because ranks that share a group add up their sums
between the first and the second. Arguments are not validated here: op.py does that.
"""

# Shapes: O = output rows, P = O padded with zeros to a multiple of 16, I = input columns, G = quantization groups,
#         S = scales that rows share by id; "..." = any batch, such as experts.

import torch

from bitmoe_kernels.ternary_gemm.reference import pad_last, padded_length

MIN_SCALE = 1e-5


def absmean_sums_reference(w_OI: torch.Tensor, groups: int, axis: int) -> torch.Tensor:
    """Sum of |w| per group, fp64 [..., G]; ``axis`` is -2 (groups of rows) or -1 (groups of columns)."""
    other_axis = -3 - axis
    sums = w_OI.abs().sum(dim=other_axis, dtype=torch.float64)  # [..., O] or [..., I]
    return sums.unflatten(-1, (groups, sums.shape[-1] // groups)).sum(dim=-1)


def absmean_sums_by_id_reference(
    w_OI: torch.Tensor, scale_ids_O: torch.Tensor, num_scales: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of |w| over the rows of each id, fp64 [..., S], and how many weights of a matrix these are, int64 [S]."""
    row_sums = w_OI.abs().sum(dim=-1, dtype=torch.float64)
    sums_S = row_sums.new_zeros(*row_sums.shape[:-1], num_scales).index_add_(-1, scale_ids_O, row_sums)
    return sums_S, torch.bincount(scale_ids_O, minlength=num_scales) * w_OI.shape[-1]


def absmean_scale_reference(sums_G: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Scale fp32 [..., G] from fp64 sums over ``count`` values each, int or [G]; NaN where it is not finite."""
    # A tensor as divisor: CUDA turns division by a Python number into a product with its rounded reciprocal.
    count_G = count.double() if isinstance(count, torch.Tensor) else torch.full_like(sums_G, count)
    mean_G = (sums_G / count_G).float()
    return mean_G.clamp(min=MIN_SCALE).masked_fill(~mean_G.isfinite(), float("nan"))


def ternary_codes_reference(w_OI: torch.Tensor, scale_G: torch.Tensor, axis: int) -> torch.Tensor:
    """Codes int8 [..., O, I] in {-1, 0, 1}; 0 where the scale is NaN."""
    other_axis = -3 - axis
    scale = scale_G.repeat_interleave(w_OI.shape[axis] // scale_G.shape[-1], dim=-1).unsqueeze(other_axis)
    return (w_OI.float() / scale).round().clamp(-1, 1).nan_to_num(nan=0.0).to(torch.int8)


def ternary_operands_reference(
    w_OI: torch.Tensor,
    scale_G: torch.Tensor,
    axis: int,
    row_dtype: torch.dtype,
    with_columns: bool,
    former_rows_OI: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Codes [..., O, I] in ``row_dtype``, transposed codes e4m3 [..., I, P] if wanted, and counts int64 [3]."""
    codes_OI = ternary_codes_reference(w_OI, scale_G, axis)
    columns_IP = None
    if with_columns:
        padded_IP = pad_last(codes_OI.transpose(-1, -2), padded_length(codes_OI.shape[-2]))
        columns_IP = padded_IP.contiguous().to(torch.float8_e4m3fn)
    former_OI = codes_OI if former_rows_OI is None else former_rows_OI.to(torch.int8)
    num_zeros, num_changed = (codes_OI == 0).sum(), (codes_OI != former_OI).sum()
    counts_3 = torch.stack([num_zeros, num_changed, torch.full_like(num_zeros, codes_OI.numel())])
    return codes_OI.to(row_dtype), columns_IP, counts_3
