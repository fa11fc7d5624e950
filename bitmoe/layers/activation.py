"""The gate of a feed-forward layer: ReLU2-GLU (BitNet a4.8, eq. 5) or SwiGLU."""

import torch

from bitmoe.config.choices import Activation
from bitmoe_kernels.relu2_glu import relu2_glu

# Shapes: F = inner features on this rank.


def gated_activation(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """Split [..., 2F] into gate and up and combine them to [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation is Activation.relu2_glu:
        return relu2_glu(gate, up)
    return torch.nn.functional.silu(gate) * up
