"""Gated feed-forward over packed projections: a dense layer, the shared expert, or all experts of a layer."""

# Shapes: T = tokens (any leading dims), H = hidden, F = inner features, R = chosen experts.

import torch
from torch import nn
from torch.nn.functional import silu

from bitmoe.infer.configuration import BitmoeConfig
from bitmoe.infer.norm import BitmoeSubNorm
from bitmoe.infer.packed_linear import LinearInput, PackedLinear, linear_input
from bitmoe_kernels.relu2_glu import relu2_glu


class BitmoeFeedForward(nn.Module):
    """ReLU2-GLU (BitNet a4.8, eq. 5) or SwiGLU, with a sub-norm in front of down where the model has one.

    Args:
        config: number formats and activation.
        inner_size: F.
        num_experts: how many of them lie in its tensors; None for one.
    """

    def __init__(self, config: BitmoeConfig, inner_size: int, num_experts: int | None = None):
        super().__init__()
        self.config = config
        self.gate_proj = PackedLinear(config, config.hidden_size, inner_size, num_experts)
        self.up_proj = PackedLinear(config, config.hidden_size, inner_size, num_experts)
        self.ffn_sub_norm = None
        if config.sub_norm:
            shape = (inner_size,) if num_experts is None else (num_experts, inner_size)
            self.ffn_sub_norm = BitmoeSubNorm(shape, config.quant_groups, config.rms_norm_eps)
        self.down_proj = PackedLinear(config, inner_size, config.hidden_size, num_experts)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.transform(linear_input(x_TH, self.config, "gate_up"))

    def transform(
        self, x: LinearInput, expert: int | torch.Tensor | None = None, prob_T1: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What is made of a quantized input: [T, H].

        Args:
            x: from ``linear_input``.
            expert: as in ``PackedLinear``.
            prob_T1: routing probabilities. They multiply behind the sub-norm: in front of it they would cancel.
        """
        gate_TF, up_TF = self.gate_proj(x, expert), self.up_proj(x, expert)
        x_TF = relu2_glu(gate_TF, up_TF) if self.config.hidden_act == "relu2_glu" else silu(gate_TF) * up_TF
        if self.ffn_sub_norm is not None:
            x_TF = self.ffn_sub_norm(x_TF, expert)
        x = linear_input(x_TF, self.config, "down")
        return self.down_proj(x if prob_T1 is None else x.weighted(prob_T1), expert)
