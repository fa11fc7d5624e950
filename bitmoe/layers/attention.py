"""Self-attention: BitLinear projections around torch's scaled dot-product attention, grouped queries, RoPE.

megatron-core's own core attention needs Transformer Engine for what long sequences will want, so the module is ours.
The fused weight is stored as megatron-core stores it, interleaved per key/value head: [q ... q, k, v] of head 0, then
of head 1; q, k and v nevertheless never share a scale.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch.nn.functional import scaled_dot_product_attention

from bitmoe.layers.bit_linear import ColumnBitLinear, RowBitLinear
from bitmoe.layers.context import LayerContext
from bitmoe.layers.sharding import ShardedParameters

# Shapes: S = sequence, B = batch, H = hidden, K = key/value heads on this rank, Q = query heads per key/value head,
#         D = width of a head.


class SelfAttention(torch.nn.Module, ShardedParameters):
    """Causal self-attention of one layer.

    Args:
        config: megatron-core's TransformerConfig (for its RoPE function).
        context: model, policy and groups.
    """

    def __init__(self, config, context: LayerContext):
        super().__init__()
        self.config, self.groups, self.recompute = config, context.groups, context.recompute_attention
        self.head_dim = config.kv_channels
        self.num_kv_heads = config.num_query_groups // context.groups.tp.size()
        self.queries_per_kv = config.num_attention_heads // config.num_query_groups
        heads = self.queries_per_kv + 2
        projection = torch.tensor([0] * self.queries_per_kv + [1, 2]).repeat_interleave(self.head_dim)
        self.linear_qkv = ColumnBitLinear(
            (self.num_kv_heads * heads * self.head_dim, config.hidden_size),
            cut_dim=0,
            projection_O=projection.repeat(self.num_kv_heads),
            role="qkv",
            context=context,
        )
        num_inputs = self.num_kv_heads * self.queries_per_kv * self.head_dim
        self.linear_proj = RowBitLinear(config.hidden_size, num_inputs, role="o", context=context)

    def forward(self, x_SBH: torch.Tensor, rotary_pos_emb: torch.Tensor) -> torch.Tensor:
        """Attend within each sequence: [S, B, H] (or its sequence-parallel slice) to the same shape.

        Args:
            x_SBH: normalized residual stream.
            rotary_pos_emb: rotation angles [S, 1, 1, D] from megatron-core's RotaryEmbedding.
        """
        qkv = self.linear_qkv(x_SBH).unflatten(-1, (self.num_kv_heads, self.queries_per_kv + 2, self.head_dim))
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        q = apply_rotary_pos_emb(q, rotary_pos_emb, config=self.config)
        k = apply_rotary_pos_emb(k, rotary_pos_emb, config=self.config)
        if self.recompute:
            out = tensor_parallel.checkpoint(causal_attention, False, q, k, v)
        else:
            out = causal_attention(q, k, v)
        return self.linear_proj(out)


def causal_attention(q_SBND: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor) -> torch.Tensor:
    """Causal attention with grouped queries: [S, B, N, D], [S, B, K, D], [S, B, K, D] to [S, B, N*D]."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBND, k_SBKD, v_SBKD))
    out_BNSD = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out_BNSD.permute(2, 0, 1, 3).flatten(2)
