"""Per-token activation quantizers in plain torch: the truth for every other implementation.

All arithmetic is fp32, for fp64 input fp64, so that parity tests can run in fp64. The sum behind INT4's mean is
``wide_sum`` and the mean is rounded once, so that the order of the sum does not show in the codes. A token (or group)
with NaN or Inf gets a NaN scale and codes 0. Arguments are not validated here: op.py does that.
"""

# Shapes: T = tokens (any leading dimensions), D = features, G = groups of features.

import math

import torch

MIN_MAGNITUDE = 1e-5
NEIGHBOURS = 4
"""Features that ``wide_sum`` adds in their own dtype."""


def quantize_int4_reference(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Absmean INT4 (README eq. 1): codes int8 [T, D] in [-8, 7], scale [T, 1]."""
    x_TD = _to_compute_dtype(x_TD)
    mean_T1 = (wide_sum(x_TD.abs()) * (1 / x_TD.shape[-1])).to(x_TD.dtype)
    scale_T1 = _scale(mean_T1, math.sqrt(7))
    return _to_int8((x_TD * (1 / scale_T1)).round().clamp(-8, 7)), scale_T1


def quantize_int8_reference(x_TD: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Absmax INT8 (README eq. 2): codes int8 [T, D], scale [T, G]."""
    absmax_TG = x_TD.unflatten(-1, (groups, x_TD.shape[-1] // groups)).abs().amax(dim=-1)
    scale_TG = int8_scale_reference(absmax_TG)
    return int8_codes_reference(x_TD, scale_TG), scale_TG


def int8_scale_reference(absmax_TG: torch.Tensor) -> torch.Tensor:
    """INT8 scale [T, G] of groups whose largest magnitude is ``absmax_TG``."""
    return _scale(_to_compute_dtype(absmax_TG), 127.0)


def int8_codes_reference(x_TD: torch.Tensor, scale_TG: torch.Tensor) -> torch.Tensor:
    """INT8 codes [T, D] of ``x_TD`` under a given scale per token and group."""
    groups = scale_TG.shape[-1]
    x_TGd = _to_compute_dtype(x_TD).unflatten(-1, (groups, x_TD.shape[-1] // groups))
    return _to_int8((x_TGd * (1 / scale_TG).unsqueeze(-1)).round().clamp(-128, 127)).flatten(-2)


def quantize_fp4_reference(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E2M1 (README eq. 3): codes int8 [T, D] holding twice the E2M1 value, scale [T, 1]."""
    x_TD = _to_compute_dtype(x_TD)
    scale_T1 = _scale(x_TD.abs().amax(dim=-1, keepdim=True), 12.0)
    ratio_TD = x_TD * (1 / scale_T1)
    # Spacing of twice the grid: 0 1 2 3 4 | 6 8 | 12. Half to even in units of it is half to even mantissa.
    step_TD = torch.where(ratio_TD.abs() < 4, 1.0, torch.where(ratio_TD.abs() < 8, 2.0, 4.0))
    return _to_int8((ratio_TD / step_TD).round() * step_TD), scale_T1


def dequantize_reference(codes_TD: torch.Tensor, scale_TG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """README eq. 4: codes times scales [T, D], multiplied in the dtype of the scales."""
    codes_TGd = codes_TD.to(scale_TG.dtype).unflatten(-1, (scale_TG.shape[-1], -1))
    return (codes_TGd * scale_TG.unsqueeze(-1)).flatten(-2).to(dtype)


def wide_sum(x_TD: torch.Tensor) -> torch.Tensor:
    """Sum over features, fp64 [T, 1]: of NEIGHBOURS, pair by pair, in the dtype of x, then in fp64.

    Parts of a row that begin at a multiple of NEIGHBOURS can be added up in any order. All norms and quantizers add so.
    """
    for _ in range(NEIGHBOURS.bit_length() - 1):
        if x_TD.shape[-1] % 2:
            x_TD = torch.nn.functional.pad(x_TD, (0, 1))
        x_TD = x_TD[..., 0::2] + x_TD[..., 1::2]
    return x_TD.sum(dim=-1, keepdim=True, dtype=torch.float64)


def _to_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def _scale(magnitude: torch.Tensor, levels: float) -> torch.Tensor:
    """``magnitude / levels`` with the magnitude clamped from below; NaN where it is not finite."""
    # A tensor as divisor: CUDA turns division by a Python number into a product with its rounded reciprocal.
    scale = magnitude.clamp(min=MIN_MAGNITUDE) / torch.full_like(magnitude, levels)
    return scale.masked_fill(~magnitude.isfinite(), float("nan"))


def _to_int8(codes: torch.Tensor) -> torch.Tensor:
    """Integer-valued floats as int8; NaN, the mark of a NaN scale, as 0."""
    return codes.nan_to_num(nan=0.0).to(torch.int8)
