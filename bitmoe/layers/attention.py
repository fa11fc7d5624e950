"""Self-attention: BitLinear projections around torch's scaled dot-product attention, grouped queries, RoPE.

megatron-core's own core attention needs Transformer Engine for what long sequences will want, so the module is ours.
The fused weight is stored as megatron-core stores it, interleaved per key/value head: [q ... q, k, v] of head 0, then
of head 1; q, k and v nevertheless never share a scale.
"""

import torch
from megatron.core import tensor_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bitmoe.config.choices import Recompute
from bitmoe.layers.bit_linear import ColumnBitLinear, RowBitLinear
from bitmoe.layers.context import LayerContext
from bitmoe.layers.quantize_input import Quantized
from bitmoe.layers.sharding import ShardedParameters
from bitmoe_kernels.rope import rope_qkv, rope_tables

# Shapes: S = sequence, B = batch, H = hidden, K = key/value heads on this rank, Q = query heads per key/value head,
#         D = width of a head.


class SelfAttention(torch.nn.Module, ShardedParameters):
    """Causal self-attention of one layer.

    Args:
        config: megatron-core's TransformerConfig.
        context: model, policy and groups.
    """

    def __init__(self, config, context: LayerContext):
        super().__init__()
        self.groups, self.recompute = context.groups, context.recompute is Recompute.selective
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

    def forward(self, x_SBH: Quantized | torch.Tensor, rotary_pos_emb: torch.Tensor) -> torch.Tensor:
        """Attend within each sequence: [S, B, H] (or its sequence-parallel slice) to the same shape.

        Args:
            x_SBH: normalized residual stream, quantized if linears are.
            rotary_pos_emb: rotation angles [S, 1, 1, D] from megatron-core's RotaryEmbedding.
        """
        tables = rope_tables(rotary_pos_emb)
        q, k, v = rope_qkv(self.linear_qkv(x_SBH), *tables, self.num_kv_heads, self.queries_per_kv)
        if self.recompute:
            out = tensor_parallel.checkpoint(causal_attention, False, q, k, v)
        else:
            out = causal_attention(q, k, v)
        return self.linear_proj(out)


# cuDNN's is the fastest on Hopper: 579 and 541 TFLOP/s forward and backward against 327 and 308 of FlashAttention-2
# (H200, 16384 tokens, heads of 128). Where it does not take a shape, torch goes on to the next.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def causal_attention(q_SBND: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor) -> torch.Tensor:
    """Causal attention with grouped queries: [S, B, N, D], [S, B, K, D], [S, B, K, D] to [S, B, N*D]."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBND, k_SBKD, v_SBKD))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        out_BNSD = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out_BNSD.permute(2, 0, 1, 3).flatten(2)
