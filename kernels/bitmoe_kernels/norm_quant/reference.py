"""Norm, quantizer and mask one after the other in plain torch, and the norm's backward: the truth for every other
implementation.

Equation numbers are those of the README. Arguments are not validated here: op.py does that.
"""

# Shapes: T = tokens (any leading dimensions), D = features, G = groups of d = D / G features.

import torch

from bitmoe_kernels.act_quant.reference import (
    quantize_fp4_reference,
    quantize_int4_reference,
    quantize_int8_reference,
    wide_sum,
)
from bitmoe_kernels.sparsify.reference import topk_mask_reference

_QUANTIZERS = {"int4": quantize_int4_reference, "int8": quantize_int8_reference, "fp4": quantize_fp4_reference}


def rms_norm_reference(x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 1 and 2: y [T, D] in the dtype of x, rstd [T, 1]."""
    rstd_T1 = rstd_reference(x_TD, eps)
    return (_to_compute_dtype(x_TD) * rstd_T1 * gain_D).to(x_TD.dtype), rstd_T1


def rms_norm_quantize_reference(
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    eps: float,
    num_format: str,
    code_dtype: torch.dtype = torch.int8,
    with_normalized: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Equations 1, 2 and 4: codes [T, D], scale [T, 1], rstd [T, 1], and y [T, D] if ``with_normalized``."""
    y_TD, rstd_T1 = rms_norm_reference(x_TD, gain_D, eps)
    codes_TD, scale_T1 = _QUANTIZERS[num_format](y_TD)
    result = codes_TD.to(code_dtype), scale_T1, rstd_T1
    return (*result, y_TD) if with_normalized else result


def sub_norm_quantize_reference(
    x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, num_format: str, groups: int, keep: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations 1, 3, 4 and 5: codes int8 [T, D], scale [T, G], rstd [T, G]."""
    x_TGd = x_TD.unflatten(-1, (groups, -1))
    rstd_TG1 = rstd_reference(x_TGd, eps)
    unit_TGd = (_to_compute_dtype(x_TGd) * rstd_TG1).to(x_TD.dtype)
    y_TGd = (unit_TGd * gain_D.unflatten(-1, (groups, -1))).to(x_TD.dtype)
    codes_TGd, scale_TG1 = _QUANTIZERS[num_format](y_TGd)
    if keep < 1:
        codes_TGd = codes_TGd * topk_mask_reference(y_TGd, keep)
    return codes_TGd.flatten(-2), scale_TG1.squeeze(-1), rstd_TG1.squeeze(-1)


def norm_backward_reference(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    rstd_TG: torch.Tensor,
    residual_grad_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 6 and 7: dx [T, D] in the dtype of x, dgain [D]."""
    shape_Gd = (rstd_TG.shape[-1], -1)
    rstd_TG1, gain_Gd = rstd_TG.unsqueeze(-1), _to_compute_dtype(gain_D).unflatten(-1, shape_Gd)
    dy_TGd = _to_compute_dtype(dy_TD).unflatten(-1, shape_Gd)
    unit_TGd = _to_compute_dtype(x_TD).unflatten(-1, shape_Gd) * rstd_TG1
    dunit_TGd = dy_TGd * gain_Gd
    dot_TG1 = (dunit_TGd * unit_TGd).mean(dim=-1, keepdim=True)
    dx_TD = (rstd_TG1 * (dunit_TGd - unit_TGd * dot_TG1)).flatten(-2)
    if residual_grad_TD is not None:
        dx_TD = dx_TD + residual_grad_TD
    return dx_TD.to(x_TD.dtype), (dy_TGd * unit_TGd).flatten(-2).flatten(0, -2).sum(0)


def rstd_reference(x_TD: torch.Tensor, eps: float) -> torch.Tensor:
    """Equation 1 over the last dimension, [T, 1]."""
    x_TD = _to_compute_dtype(x_TD)
    return torch.rsqrt(wide_sum(x_TD.square()) * (1 / x_TD.shape[-1]) + eps).to(x_TD.dtype)


def _to_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()
