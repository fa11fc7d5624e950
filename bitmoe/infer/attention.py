"""Causal attention with grouped queries and rotary positions, over packed projections.

The attention itself is transformers' (``attn_implementation``: sdpa, or eager); the cache it is given decides how
keys and values are kept, which are rotated before they are.
"""

# Shapes: B = batch, S = positions of this call, H = hidden, N = query heads, K = key/value heads, D = width of a head,
#         h = D / 2, I = N D.

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from bitmoe.infer.configuration import BitmoeConfig
from bitmoe.infer.norm import BitmoeSubNorm
from bitmoe.infer.packed_linear import PackedLinear, linear_input


def rotary_angles(position_ids_BS: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Angles fp32 [B, S, h]: position / theta^(2i/D) for the pair of features i and i + h."""
    half = head_dim // 2
    frequency_h = 1.0 / theta ** (torch.arange(half, dtype=torch.float32, device=position_ids_BS.device) / half)
    return position_ids_BS[..., None].float() * frequency_h


def rotate(x_BNSD: torch.Tensor, cos_BSh: torch.Tensor, sin_BSh: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of features i and i + h."""
    cos_B1Sh, sin_B1Sh = cos_BSh.unsqueeze(1), sin_BSh.unsqueeze(1)
    first, second = x_BNSD.chunk(2, dim=-1)
    return torch.cat([first * cos_B1Sh - second * sin_B1Sh, second * cos_B1Sh + first * sin_B1Sh], dim=-1)


class BitmoeAttention(nn.Module):
    """Attention of layer ``layer_idx``; its attributes are those transformers' attention functions read."""

    is_causal = True

    def __init__(self, config: BitmoeConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = PackedLinear(config, config.hidden_size, query_size)
        self.k_proj = PackedLinear(config, config.hidden_size, key_value_size)
        self.v_proj = PackedLinear(config, config.hidden_size, key_value_size)
        self.attn_sub_norm = None
        if config.sub_norm:
            self.attn_sub_norm = BitmoeSubNorm((query_size,), config.quant_groups, config.rms_norm_eps)
        self.o_proj = PackedLinear(config, query_size, config.hidden_size)

    def forward(
        self,
        x_BSH: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, H] to the same shape, and the attention weights where the implementation gives them."""
        x = linear_input(x_BSH, self.config, "qkv")
        heads = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q_BNSD, k_BKSD, v_BKSD = (head.transpose(1, 2) for head in heads)
        q_BNSD, k_BKSD = rotate(q_BNSD, *rotation), rotate(k_BKSD, *rotation)
        if past_key_values is not None:
            k_BKSD, v_BKSD = past_key_values.update(k_BKSD, v_BKSD, self.layer_idx, position_ids=position_ids)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out_BSND, weights = attend(
            self, q_BNSD, k_BKSD, v_BKSD, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        out_BSI = out_BSND.flatten(2)
        if self.attn_sub_norm is not None:
            out_BSI = self.attn_sub_norm(out_BSI)
        return self.o_proj(linear_input(out_BSI, self.config, "o")), weights
