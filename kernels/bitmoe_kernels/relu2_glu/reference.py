"""Squared-ReLU gated linear unit, sub-norm and quantizer in plain torch: the truth for every other implementation.

Computes in fp32 (fp64 for fp64 input). Torch derives the gradient of the unit alone; that of the whole chain, which
passes straight through quantizer and rounding, is written out. Equation numbers are those of the README. Arguments are
not validated here: op.py does that.
"""

# Shapes: T = tokens (any leading dimensions), F = features of the feed-forward, G = groups of d = F / G features,
# E = experts, R = tokens sorted by expert.

import torch

from bitmoe_kernels.act_quant.reference import (
    quantize_fp4_reference,
    quantize_int4_reference,
    quantize_int8_reference,
)
from bitmoe_kernels.norm_quant.reference import sub_norm_quantize_reference

_QUANTIZERS = {"int4": quantize_int4_reference, "int8": quantize_int8_reference, "fp4": quantize_fp4_reference}


def relu2_glu_reference(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """``relu(gate)^2 * up`` [T, F] in the dtype of ``gate_TF``, differentiable."""
    return (_to_compute_dtype(gate_TF).relu().square() * _to_compute_dtype(up_TF)).to(gate_TF.dtype)


def relu2_glu_quantize_reference(
    gate_up_T2F: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    num_format: str,
    groups: int,
    expert_R: torch.Tensor | None,
    weight_T1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Equations 1 to 6: codes int8 [T, F], scale [T, G], rstd [T, G] or None."""
    h_TF = relu2_glu_reference(*gate_up_T2F.chunk(2, dim=-1))
    if gain is not None:
        gain = _gain_of_rows(gain, expert_R, h_TF)
        codes_TF, scale_TG, rstd_TG = sub_norm_quantize_reference(h_TF, gain, eps, num_format, groups, 1.0)
    else:
        codes_TGd, scale_TG1 = _QUANTIZERS[num_format](h_TF.unflatten(-1, (groups, -1)))
        codes_TF, scale_TG, rstd_TG = codes_TGd.flatten(-2), scale_TG1.squeeze(-1), None
    return codes_TF, scale_TG if weight_T1 is None else scale_TG * weight_T1.to(scale_TG.dtype), rstd_TG


def relu2_glu_quantize_backward_reference(
    dy_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    gain: torch.Tensor | None,
    rstd_TG: torch.Tensor | None,
    expert_R: torch.Tensor | None,
    weight_T1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Equations 7 to 11: dgate_up [T, 2F] in the dtype of gate_up; dgain and dweight [T, 1], fp32 (fp64 for fp64), or
    None."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    dh_TF, dgain, dweight_T1 = _to_compute_dtype(dy_TF), None, None
    h_TF = relu2_glu_reference(gate_TF, up_TF)
    if weight_T1 is not None:
        y_TF = _to_compute_dtype(h_TF)
        if gain is not None:
            y_TF = _unit(h_TF, rstd_TG).flatten(-2) * _gain_of_rows(gain, expert_R, h_TF)
        dweight_T1 = (dh_TF * y_TF).sum(-1, keepdim=True)
        dh_TF = dh_TF * weight_T1.to(dh_TF.dtype)
    if gain is not None:
        dh_TF, dgain = _sub_norm_backward(dh_TF, h_TF, gain, rstd_TG, expert_R)
    relu_TF, up_TF = _to_compute_dtype(gate_TF).relu(), _to_compute_dtype(up_TF)
    dgate_up_T2F = torch.cat([dh_TF * 2 * relu_TF * up_TF, dh_TF * relu_TF.square()], dim=-1)
    return dgate_up_T2F.to(gate_up_T2F.dtype), dgain, dweight_T1


def _sub_norm_backward(dy_TF, h_TF, gain, rstd_TG, expert_R):
    """Equations 8 to 10: dh and dgain in the dtype of computation."""
    unit_TGd = _unit(h_TF, rstd_TG)
    dunit_TGd = (dy_TF * _gain_of_rows(gain, expert_R, h_TF)).view_as(unit_TGd)
    mean_TG1 = (dunit_TGd * unit_TGd).mean(dim=-1, keepdim=True)
    dh_TF = (rstd_TG.unsqueeze(-1) * (dunit_TGd - unit_TGd * mean_TG1)).flatten(-2)
    dgain_TF = (dy_TF * unit_TGd.to(h_TF.dtype).flatten(-2)).view(-1, h_TF.shape[-1])
    if expert_R is None:
        return dh_TF, dgain_TF.sum(dim=0)
    return dh_TF, torch.zeros_like(gain, dtype=dgain_TF.dtype).index_add_(0, expert_R, dgain_TF)


def _unit(h_TF: torch.Tensor, rstd_TG: torch.Tensor) -> torch.Tensor:
    """Normalized h [T, G, d], not rounded."""
    return _to_compute_dtype(h_TF).unflatten(-1, (rstd_TG.shape[-1], -1)) * rstd_TG.unsqueeze(-1)


def ends_of_experts(expert_R: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 [E]: where the tokens of each expert end, of ascending experts [R]."""
    experts_E = torch.arange(num_experts, dtype=expert_R.dtype, device=expert_R.device)
    return torch.searchsorted(expert_R, experts_E, right=True, out_int32=True)


def _gain_of_rows(gain: torch.Tensor, expert_R: torch.Tensor | None, h_TF: torch.Tensor) -> torch.Tensor:
    """[F], or each row's gain [T, F]."""
    return gain if expert_R is None else gain.index_select(0, expert_R).view_as(h_TF)


def _to_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()
