"""Gated FFN: gate and up, ReLU2-GLU or SwiGLU, sub-norm, down. Dense layers and shared experts are this module."""

import torch

from bitmoe.config.schema import Activation
from bitmoe.layers.bit_linear import ColumnBitLinear, RowBitLinear
from bitmoe.layers.context import LayerContext
from bitmoe.layers.sharding import ShardedParameters
from bitmoe_kernels.relu2_glu import relu2_glu

# Shapes: S = sequence, B = batch, H = hidden, F = inner features on this rank.


def gated_activation(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """Split [..., 2F] into gate and up and combine them to [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation is Activation.relu2_glu:
        return relu2_glu(gate, up)
    return torch.nn.functional.silu(gate) * up


class FeedForward(torch.nn.Module, ShardedParameters):
    """Gated FFN split over tensor-parallel ranks.

    The fused weight of gate and up is stored as [2, F, H], so that cutting it over ranks keeps gate and up apart.

    Args:
        ffn_size: inner width over all ranks.
        context: model, policy and groups.
    """

    def __init__(self, ffn_size: int, context: LayerContext):
        super().__init__()
        self.groups, self.activation = context.groups, context.model.activation
        hidden_size, local_size = context.model.hidden_size, ffn_size // context.groups.tp.size()
        projection = torch.tensor([0, 1]).repeat_interleave(local_size)
        self.linear_fc1 = ColumnBitLinear(
            (2, local_size, hidden_size), cut_dim=1, projection_O=projection, role="gate_up", context=context
        )
        self.linear_fc2 = RowBitLinear(hidden_size, local_size, role="down", context=context)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """[S, B, H] (or its sequence-parallel slice) to the same shape."""
        return self.linear_fc2(gated_activation(self.activation, self.linear_fc1(x_SBH)))
