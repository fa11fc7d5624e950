"""Norm, quantizer and mask one after the other in plain torch: the truth for every other implementation.

Equation numbers are those of the README. Arguments are not validated here: op.py does that.
"""

# Shapes: T = tokens (any leading dimensions), D = features, G = groups of d = D / G features.

import torch

from bitmoe_kernels.act_quant.reference import (
    quantize_fp4_reference,
    quantize_int4_reference,
    quantize_int8_reference,
)
from bitmoe_kernels.sparsify.reference import topk_mask_reference

_QUANTIZERS = {"int4": quantize_int4_reference, "int8": quantize_int8_reference, "fp4": quantize_fp4_reference}


def rms_norm_quantize_reference(
    x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, num_format: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations 1, 2 and 4: codes int8 [T, D], scale [T, 1], rstd [T, 1]."""
    rstd_T1 = _rstd(x_TD, eps)
    y_TD = (_to_compute_dtype(x_TD) * rstd_T1 * gain_D).to(x_TD.dtype)
    return *_QUANTIZERS[num_format](y_TD), rstd_T1


def sub_norm_quantize_reference(
    x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, num_format: str, groups: int, keep: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations 1, 3, 4 and 5: codes int8 [T, D], scale [T, G], rstd [T, G]."""
    x_TGd = x_TD.unflatten(-1, (groups, -1))
    rstd_TG1 = _rstd(x_TGd, eps)
    unit_TGd = (_to_compute_dtype(x_TGd) * rstd_TG1).to(x_TD.dtype)
    y_TGd = (unit_TGd * gain_D.unflatten(-1, (groups, -1))).to(x_TD.dtype)
    codes_TGd, scale_TG1 = _QUANTIZERS[num_format](y_TGd)
    if keep < 1:
        codes_TGd = codes_TGd * topk_mask_reference(y_TGd, keep)
    return codes_TGd.flatten(-2), scale_TG1.squeeze(-1), rstd_TG1.squeeze(-1)


def _rstd(x_TD: torch.Tensor, eps: float) -> torch.Tensor:
    """Equation 1 over the last dimension, [T, 1]."""
    x_TD = _to_compute_dtype(x_TD)
    sum_T1 = x_TD.square().sum(dim=-1, keepdim=True, dtype=torch.float64)
    # A tensor as divisor: CUDA turns division by a Python number into a product with its rounded reciprocal.
    return torch.rsqrt(sum_T1 / torch.full_like(sum_T1, x_TD.shape[-1]) + eps).to(x_TD.dtype)


def _to_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()
