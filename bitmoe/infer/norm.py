"""Norms: RMSNorm of the residual stream, and the sub-norm in front of o and down (BitNet's SubLN).

Both compute in fp32 and round to the model's dtype as the training layers do, bit for bit; the sub-norm's mean squares
are those of each quantization group.
"""

# Shapes: T = tokens (any leading dims), H = hidden, I = features, G = groups of i = I / G features, E = experts.

import torch
from torch import nn

from bitmoe_kernels.norm_quant.reference import rstd_reference


class BitmoeRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        x32_TH = x_TH.float()
        return (x32_TH * rstd_reference(x32_TH, self.eps) * self.weight).to(x_TH.dtype)


class BitmoeSubNorm(nn.Module):
    """RMSNorm whose statistics are those of each quantization group.

    Args:
        shape: of the gain: (I,), or (E, I) for the experts of a layer.
        groups: equal contiguous groups of the I features.
        eps: added to the mean square.
    """

    def __init__(self, shape: tuple[int, ...], groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.groups, self.eps = groups, eps

    def forward(self, x_TI: torch.Tensor, expert: int | torch.Tensor | None = None) -> torch.Tensor:
        """Normalize [T, I]; with ``expert`` a tensor [R], [R, T, I] with the gain of expert R."""
        gain_I = self.weight if expert is None else self.weight[expert]
        x_TGi = x_TI.float().unflatten(-1, (self.groups, -1))
        unit_TI = (x_TGi * rstd_reference(x_TGi, self.eps)).flatten(-2).to(x_TI.dtype)
        return (unit_TI * (gain_I if gain_I.dim() == 1 else gain_I.unsqueeze(-2))).to(x_TI.dtype)
