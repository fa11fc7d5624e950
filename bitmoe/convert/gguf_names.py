"""Tensor names of GGUF files, and the order of query and key rows that llama.cpp's ``llama`` graph wants.

Our rotary embedding turns features i and i + D/2 of a head, as Hugging Face models do. The ``llama`` graph turns the
neighbours 2 i and 2 i + 1, so rows of q and k are interleaved for it; the ``bitnet`` graph turns as we do.
"""

# Shapes: N = heads, D = width of a head, O = N D output rows, "..." = any further dimensions.

import re

import torch

from bitmoe.config.errors import InputError

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_EXPORTED_WHOLE = {theirs: name for name, theirs in _WHOLE.items()}
_EXPORTED_OF_A_LAYER = {theirs: name for name, theirs in _OF_A_LAYER.items()}


def gguf_name(name: str) -> str:
    """``blk.0.attn_q.weight`` for ``model.layers.0.self_attn.q_proj.weight``.

    Raises:
        InputError: a tensor that GGUF has no place for.
    """
    parts = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if name in _WHOLE:
        return _WHOLE[name]
    if parts is None or parts[2] not in _OF_A_LAYER:
        raise InputError(f"GGUF has no place for the tensor {name}", fix="convert to=bitmoe, which holds everything")
    return f"blk.{parts[1]}.{_OF_A_LAYER[parts[2]]}.weight"


def export_name(name: str) -> str:
    """What ``gguf_name`` was made from.

    Raises:
        InputError: a name it does not make.
    """
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if name in _EXPORTED_WHOLE:
        return _EXPORTED_WHOLE[name]
    if parts is None or parts[2] not in _EXPORTED_OF_A_LAYER:
        raise InputError(f"{name} is no tensor of a model that bitmoe writes")
    return f"model.layers.{parts[1]}.{_EXPORTED_OF_A_LAYER[parts[2]]}.weight"


def interleave_halves(rows_O: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [O, ...] of q or k with i and i + D/2 of each head side by side, as the ``llama`` graph wants them."""
    return rows_O.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
