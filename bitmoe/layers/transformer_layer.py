"""One transformer layer: norm, attention, residual; norm, FFN or MoE, residual.

The layer is ours, not megatron-core's: that one hands its sub-modules arguments that change from release to release.
megatron-core's TransformerBlock builds it, numbers it, recomputes it and checkpoints it like its own.
"""

import torch
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset

from bitmoe.layers.attention import SelfAttention
from bitmoe.layers.context import LayerContext
from bitmoe.layers.feed_forward import FeedForward
from bitmoe.layers.moe import MoELayer
from bitmoe.layers.norm import RMSNorm
from bitmoe.layers.quantize_input import Quantized, normalize_rows, normalize_rows_for_router
from bitmoe.layers.sharding import ShardedParameters

# Shapes: S = sequence (this rank's slice under sequence parallelism), B = batch, H = hidden.


class TransformerLayer(torch.nn.Module, BaseTransformerLayer, ShardedParameters):
    """A pre-norm layer, dense or MoE.

    Args:
        config: megatron-core's TransformerConfig.
        context: model, policy and groups.
        layer_number: 1-based number inside this pipeline stage's chunk.
        pg_collection: megatron-core's process groups (ignored: ``context`` has them).
        vp_stage: which model chunk of a virtual pipeline this layer belongs to.
    """

    def __init__(
        self, config, context: LayerContext, layer_number: int, pg_collection=None, vp_stage: int | None = None
    ):
        super().__init__()
        self.groups, self.policy = context.groups, context.policy
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, context.groups.pp.rank())
        self.input_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, context)
        self.pre_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        if context.moe.num_experts:
            self.mlp = MoELayer(config, context)
            self.mlp.set_layer_number(self.layer_number)
        else:
            self.mlp = FeedForward(context.model.ffn_hidden_size, context)

    def forward(
        self, hidden_states: torch.Tensor, rotary_pos_emb: torch.Tensor, context: torch.Tensor | None = None, **unused
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, H] to the same shape; ``context`` is passed through, the arguments of other architectures ignored."""
        residual_SBH, x_SBH = self._normalized(hidden_states, self.input_layernorm, "qkv")
        residual_SBH = residual_SBH + self.self_attention(x_SBH, rotary_pos_emb)
        if isinstance(self.mlp, MoELayer):
            return self._with_experts(residual_SBH), context
        residual_SBH, x_SBH = self._normalized(residual_SBH, self.pre_mlp_layernorm, "gate_up")
        return residual_SBH + self.mlp(x_SBH), context

    def _with_experts(self, x_SBH: torch.Tensor) -> torch.Tensor:
        norm = self.pre_mlp_layernorm
        if not self.policy.is_ternary:
            return x_SBH + self.mlp(norm(x_SBH))
        x_SBH, *normalized = normalize_rows_for_router(x_SBH, norm, "gate_up", self.policy)
        return x_SBH + self.mlp(*normalized)

    def _normalized(
        self, x_SBH: torch.Tensor, norm: RMSNorm, role: str
    ) -> tuple[torch.Tensor, Quantized | torch.Tensor]:
        """The residual stream, and the input of a linear: quantized, if linears are."""
        return normalize_rows(x_SBH, norm, role, self.policy) if self.policy.is_ternary else (x_SBH, norm(x_SBH))
