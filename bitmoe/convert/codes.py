"""Ternary codes and scales of an exported matrix: the very numbers that the training forward multiplies.

Sums of |w| are added as in training, first along the rows of a column-parallel matrix and along the columns of a
row-parallel one, so scales agree to the last bit and no code can flip. Sums in fp64 and quotients in fp32 take more
room than bf16 weights: they are made of a few rows or columns at a time.
"""

# Shapes: O = output rows, I = input columns, G = quantization groups.

import torch

from bitmoe.config.choices import WeightFormat
from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config
from bitmoe_kernels.weight_quant import absmean_scale, absmean_sums, ternary_codes

# Rows, or columns, that are computed at once.
_LINES = 64


def is_ternary(name: str, config: Config) -> bool:
    """Whether an exported tensor leaves as codes and scales."""
    return config.quant.weights is WeightFormat.ternary and name.endswith("_proj.weight")


def is_row_parallel(name: str) -> bool:
    """Whether the groups of a matrix cut its input columns (o and down) and not its output rows."""
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def ternary_matrix(name: str, w_OI: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [O, I] and scales fp32 [G] of one matrix.

    Args:
        name: its exported name.
        w_OI: latent weights, of stacked experts those of one.
        groups: G.

    Raises:
        InputError: NaN or infinity.
    """
    check_finite(name, w_OI)
    dim = 1 if is_row_parallel(name) else 0
    parts = w_OI.split(_LINES, dim)
    line_sums = torch.cat([absmean_sums(part, groups=part.shape[dim], dim=dim) for part in parts])
    scale_G = absmean_scale(line_sums.unflatten(0, (groups, -1)).sum(-1), count=w_OI.numel() // groups)
    line_scales = scale_G.repeat_interleave(w_OI.shape[dim] // groups).split(_LINES)
    codes_OI = torch.empty(w_OI.shape, dtype=torch.int8)
    for codes, part, scale in zip(codes_OI.split(_LINES, dim), parts, line_scales, strict=True):
        codes.copy_(ternary_codes(part, scale, dim=dim))
    return codes_OI, scale_G


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: there is one; names the tensor.
    """
    if not tensor.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity", fix="convert another checkpoint")
