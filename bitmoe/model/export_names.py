"""Names under which a model leaves the training layout, and how they make up the tensors of a checkpoint.

A checkpoint fuses what one product can compute: q, k and v of each key/value head lie together, gate and up are one
tensor, layers are stacked. Outside, every logical matrix stands alone under the name transformers would give it
(``model.layers.0.self_attn.q_proj.weight``). A ``Slot`` is one tensor of one layer of a checkpoint together with the
names it splits into; ``split`` and ``fuse`` go from one to the other and back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from bitmoe.config.schema import Config
from bitmoe.model.sizes import head_dim, num_query_groups, padded_vocab_size

# Shapes: V = vocabulary, H = hidden size, O = outputs of q, k and v together, F = inner size, E = experts,
#         I = N D = inputs of the o projection.


class Fusion(Enum):
    """How the tensor of a slot is made of exported ones."""

    none = "none"
    """It is the exported tensor."""
    vocabulary = "vocabulary"
    """The exported tensor and padding rows of zeros behind it."""
    qkv = "qkv"
    """For each key/value head its query heads, its key, its value."""
    gate_up = "gate_up"
    """Gate and up side by side in dimension -3."""


@dataclass(frozen=True)
class Slot:
    """One tensor of one layer of a checkpoint."""

    key: str
    """Its name in the checkpoint."""
    layer: int | None
    """Its place on the stacked axis of layers; None for a tensor of the whole model."""
    names: tuple[str, ...]
    """The exported tensors it consists of."""
    shape: tuple[int, ...]
    """Without the axis of layers."""
    fusion: Fusion = Fusion.none


def slots(config: Config) -> list[Slot]:
    """Every tensor of a model's checkpoint in the order of the layers; ``model.vocab_size`` must be known."""
    model = config.model
    vocabulary_VH = (padded_vocab_size(model), model.hidden_size)
    embedding = Slot(
        "embedding.word_embeddings.weight", None, ("model.embed_tokens.weight",), vocabulary_VH, Fusion.vocabulary
    )
    head = Slot("output_layer.weight", None, ("lm_head.weight",), vocabulary_VH, Fusion.vocabulary)
    norm = Slot("decoder.final_layernorm.weight", None, ("model.norm.weight",), (model.hidden_size,))
    layers = [slot for layer in range(model.num_layers) for slot in _layer_slots(config, layer)]
    return [embedding, *layers, norm, *([] if model.tie_embeddings else [head])]


def export_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every exported tensor by its name, in the order of ``slots``."""
    return {name: shape for slot in slots(config) for name, shape in _part_shapes(slot, config).items()}


def split(slot: Slot, fused: torch.Tensor, config: Config) -> dict[str, torch.Tensor]:
    """The exported tensors of a slot, as views where they can be.

    Args:
        slot: which tensor.
        fused: its value, of one layer; of experts also a single one, without their axis.
        config: of the model.
    """
    if slot.fusion is Fusion.qkv:
        heads = fused.unflatten(0, (num_query_groups(config.model), -1, head_dim(config.model)))
        parts = [part.flatten(0, 2) for part in heads.split([heads.shape[1] - 2, 1, 1], dim=1)]
    elif slot.fusion is Fusion.gate_up:
        parts = fused.unbind(-3)
    elif slot.fusion is Fusion.vocabulary:
        parts = [fused[: config.model.vocab_size]]
    else:
        parts = [fused]
    return dict(zip(slot.names, parts, strict=True))


def fuse(slot: Slot, parts: Mapping[str, torch.Tensor], config: Config) -> torch.Tensor:
    """What ``split`` takes apart; padding rows of the vocabulary are zeros."""
    tensors = [parts[name] for name in slot.names]
    if slot.fusion is Fusion.qkv:
        heads = [
            tensor.unflatten(0, (num_query_groups(config.model), -1, head_dim(config.model))) for tensor in tensors
        ]
        return torch.cat(heads, dim=1).flatten(0, 2)
    if slot.fusion is Fusion.gate_up:
        return torch.stack(tensors, dim=-3)
    if slot.fusion is Fusion.vocabulary:
        padding = tensors[0].new_zeros(slot.shape[0] - tensors[0].shape[0], slot.shape[1])
        return torch.cat([tensors[0], padding])
    return tensors[0]


def _layer_slots(config: Config, layer: int) -> list[Slot]:
    model = config.model

    def slot(key: str, name: str | tuple[str, ...], shape: tuple[int, ...], fusion: Fusion = Fusion.none) -> Slot:
        parts = (name,) if isinstance(name, str) else name
        names = tuple(f"model.layers.{layer}.{part}" for part in parts)
        return Slot(f"decoder.layers.{key}", layer, names, shape, fusion)

    width, inputs = head_dim(model), model.num_attention_heads * head_dim(model)
    fused_rows = inputs + 2 * num_query_groups(model) * width
    qkv = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
    sub_norm = [slot("self_attention.linear_proj.sub_norm.weight", "self_attn.attn_sub_norm.weight", (inputs,))]
    return [
        slot("input_layernorm.weight", "input_layernorm.weight", (model.hidden_size,)),
        slot("self_attention.linear_qkv.weight", qkv, (fused_rows, model.hidden_size), Fusion.qkv),
        *(sub_norm if model.sub_norm else []),
        slot("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (model.hidden_size, inputs)),
        slot("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (model.hidden_size,)),
        *_feed_forward_slots(config, slot),
    ]


def _feed_forward_slots(config: Config, slot: Callable[..., Slot]) -> list[Slot]:
    model, moe = config.model, config.moe

    def dense(key: str, name: str, inner: int) -> list[Slot]:
        pair = (f"{name}.gate_proj.weight", f"{name}.up_proj.weight")
        sub_norm = [slot(f"{key}.linear_fc2.sub_norm.weight", f"{name}.ffn_sub_norm.weight", (inner,))]
        return [
            slot(f"{key}.linear_fc1.weight", pair, (2, inner, model.hidden_size), Fusion.gate_up),
            *(sub_norm if model.sub_norm else []),
            slot(f"{key}.linear_fc2.weight", f"{name}.down_proj.weight", (model.hidden_size, inner)),
        ]

    if not moe.num_experts:
        return dense("mlp", "mlp", model.ffn_hidden_size)
    experts, inner = moe.num_experts, moe.ffn_hidden_size
    pair = ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight")
    return [
        slot("mlp.router.weight", "mlp.router.weight", (experts, model.hidden_size)),
        *([slot("mlp.router.expert_bias", "mlp.router.expert_bias", (experts,))] if moe.expert_bias else []),
        slot("mlp.experts.fc1_weight", pair, (experts, 2, inner, model.hidden_size), Fusion.gate_up),
        *(
            [slot("mlp.experts.sub_norm_weight", "mlp.experts.ffn_sub_norm.weight", (experts, inner))]
            if model.sub_norm
            else []
        ),
        slot("mlp.experts.fc2_weight", "mlp.experts.down_proj.weight", (experts, model.hidden_size, inner)),
        *(dense("mlp.shared_experts", "mlp.shared_expert", moe.shared_expert_size) if moe.shared_expert_size else []),
    ]


def _part_shapes(slot: Slot, config: Config) -> dict[str, tuple[int, ...]]:
    parts = split(slot, torch.empty(slot.shape, device="meta"), config)
    return {name: tuple(part.shape) for name, part in parts.items()}
