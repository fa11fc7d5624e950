"""Gated FFN: gate and up, ReLU2-GLU or SwiGLU, sub-norm, down. Dense layers and shared experts are this module."""

import torch

from bitmoe.layers.bit_linear import ColumnBitLinear, RowBitLinear
from bitmoe.layers.context import LayerContext
from bitmoe.layers.quantize_input import Quantized
from bitmoe.layers.sharding import ShardedParameters

# Shapes: S = sequence, B = batch, H = hidden, F = inner features on this rank.


class FeedForward(torch.nn.Module, ShardedParameters):
    """Gated FFN split over tensor-parallel ranks.

    The fused weight of gate and up is stored as [2, F, H], so that cutting it over ranks keeps gate and up apart.

    Args:
        ffn_size: inner width over all ranks.
        context: model, policy and groups.
    """

    def __init__(self, ffn_size: int, context: LayerContext):
        super().__init__()
        self.groups = context.groups
        hidden_size, local_size = context.model.hidden_size, ffn_size // context.groups.tp.size()
        projection = torch.tensor([0, 1]).repeat_interleave(local_size)
        self.linear_fc1 = ColumnBitLinear(
            (2, local_size, hidden_size), cut_dim=1, projection_O=projection, role="gate_up", context=context
        )
        self.linear_fc2 = RowBitLinear(
            hidden_size, local_size, role="down", context=context, activation=context.model.activation
        )

    def forward(self, x_SBH: Quantized | torch.Tensor) -> torch.Tensor:
        """Normalized rows [S, B, H] (or their sequence-parallel slice) to the same shape."""
        return self.linear_fc2(self.linear_fc1(x_SBH, self.linear_fc2.whole_down_input(), self.linear_fc2.sub_norm))
