"""``run.init_from``: a new run that starts from the weights of another model, in any layout.

Every rank reads only what it holds: of each layer its own experts, of each tensor its own part. Optimizer, step count
and position in the data are those of a new run.

A dense model can become a mixture of experts (upcycling, arXiv:2212.05055): every routed expert starts as the dense
FFN, the router from random values. The probabilities of the chosen experts sum to one, so the first step computes the
dense function; where a constant stands before them or a shared expert beside them, the down projections are divided
by it. A ternary matrix divided by a power of two keeps its codes and divides its scale; by another number, codes can
change where the quotient is rounded.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from bitmoe.config.choices import Precision
from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config, MoEConfig
from bitmoe.model.export_names import Slot, slots
from bitmoe.model.sizes import head_dim, num_query_groups
from bitmoe.train.engine import MegatronEngine
from bitmoe.train.weight_source import WeightSource

_LAYERS = "decoder.layers."
_ROUTER = f"{_LAYERS}mlp.router."
_EXPERTS = f"{_LAYERS}mlp.experts."
_SHARED = f"{_LAYERS}mlp.shared_experts."

# Tensors of stacked experts, and the dense FFN's that each of them starts as.
_DENSE_OF_EXPERTS = {
    f"{_EXPERTS}fc1_weight": f"{_LAYERS}mlp.linear_fc1.weight",
    f"{_EXPERTS}sub_norm_weight": f"{_LAYERS}mlp.linear_fc2.sub_norm.weight",
    f"{_EXPERTS}fc2_weight": f"{_LAYERS}mlp.linear_fc2.weight",
}


def check_source(source: Config, config: Config) -> list[str]:
    """Refuse weights that do not fit a new run.

    Args:
        source: config of the weights.
        config: of the run; while its model.vocab_size is null, the vocabulary is left out.

    Returns:
        Warnings: what fits, but is another function of the same weights.

    Raises:
        InputError: it is another model, or a dense one that cannot become the run's mixture of experts.
    """
    if source.moe.num_experts and not config.moe.num_experts:
        raise InputError(
            f"the weights are of a mixture of {source.moe.num_experts} experts, the run is of a dense model",
            fix=f"moe.num_experts={source.moe.num_experts}, or other weights",
            key="run.init_from",
        )
    there, here = _identity(source), _identity(config)
    if config.model.vocab_size is None:
        del here["model.vocab_size"]
    # Upcycling has rules of its own for the FFN.
    different = [key for key in here if key in there and there[key] != here[key]]
    if different:
        listed = "; ".join(f"{key} is {_text(there[key])} there, {_text(here[key])} here" for key in different)
        fix = f"{' '.join(f'{key}={_text(there[key])}' for key in different)}, or other weights"
        if "model.vocab_size" in different:
            fix += " (the tokenizer must be that of the weights: a vocabulary can neither grow nor shrink)"
        raise InputError(f"the weights are of another model: {listed}", fix=fix, key="run.init_from")
    if is_upcycled(source, config):
        _check_upcycling(source, config.moe)
    return list(_warnings(source, config))


def is_upcycled(source: Config, config: Config) -> bool:
    """Whether a dense model becomes a mixture of experts."""
    return bool(config.moe.num_experts) and not source.moe.num_experts


@torch.no_grad()
def init_from(engine: MegatronEngine, source: WeightSource) -> None:
    """Give a new run the weights of a source that ``check_source`` accepts.

    Args:
        engine: has taken no step.
        source: read on every rank, for its own part.

    Raises:
        InputError: a tensor has another shape than the source's config says, or holds NaN or infinity.
    """
    upcycled = is_upcycled(source.config, engine.config)
    weights = _Upcycled(source, engine.config.moe) if upcycled else source
    slot_at = {(slot.key, slot.layer): slot for slot in slots(engine.config)}
    for shard in engine.sharded_state().values():
        slot = slot_at[shard.key, shard.global_offset[0] if shard.prepend_axis_num else None]
        if not (upcycled and slot.key.startswith(_ROUTER)):
            _fill(shard, slot, weights)
    engine.policy.parameters_changed()
    # The optimizer's fp32 weights are copies of the parameters.
    engine.optimizer.reload_model_params()


def _fill(shard: ShardedTensor, slot: Slot, source: "WeightSource | _Upcycled") -> None:
    """Copy this rank's part of one tensor, of stacked experts one expert after the other."""
    offset = shard.global_offset[shard.prepend_axis_num :]
    if slot.key.startswith(_EXPERTS):
        for index, target in enumerate(shard.data):
            expert = offset[0] + index
            value = _checked(source.read_slot(slot, expert), slot, slot.shape[1:])
            target.copy_(_part(value, offset[1:], target.shape))
    else:
        shard.data.copy_(_part(_checked(source.read_slot(slot), slot, slot.shape), offset, shard.data.shape))


def _checked(value: torch.Tensor, slot: Slot, shape: tuple[int, ...]) -> torch.Tensor:
    problem = ""
    if tuple(value.shape) != tuple(shape):
        problem = f"has the shape {list(value.shape)}, not {list(shape)}"
    elif not value.isfinite().all():
        problem = "holds NaN or infinity"
    if problem:
        name = slot.key if slot.layer is None else f"{slot.key}[{slot.layer}]"
        raise InputError(f"{name} of the weights {problem}", fix="give other weights", key="run.init_from")
    return value


def _part(value: torch.Tensor, offset: tuple[int, ...], shape: torch.Size) -> torch.Tensor:
    """The block of ``shape`` that begins at ``offset``."""
    return value[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))]


class _Upcycled:
    """A dense model, read as a mixture of experts that computes the same function; the router is not part of it.

    Args:
        source: the dense model.
        moe: what it becomes; ``check_source`` accepts it.
    """

    def __init__(self, source: WeightSource, moe: MoEConfig):
        self._source = source
        self._dense = {(slot.key, slot.layer): slot for slot in slots(source.config)}
        # Routed experts together and the shared expert give one half each.
        parts = 2 if moe.shared_expert_size else 1
        self._shared_divisor, self._routed_divisor = parts, parts * _scaling_factor(moe)

    def read_slot(self, slot: Slot, expert: int | None = None) -> torch.Tensor:
        """The dense tensor that ``slot`` starts as, the same for every expert."""
        is_routed = slot.key.startswith(_EXPERTS)
        key = _DENSE_OF_EXPERTS[slot.key] if is_routed else slot.key.replace(_SHARED, f"{_LAYERS}mlp.")
        value = self._source.read_slot(self._dense[key, slot.layer])
        if key != _DENSE_OF_EXPERTS[f"{_EXPERTS}fc2_weight"]:
            return value
        return value / (self._routed_divisor if is_routed else self._shared_divisor)


def _check_upcycling(source: Config, moe: MoEConfig) -> None:
    """Refuse a mixture whose first step would not compute the dense function."""
    width = source.model.ffn_hidden_size
    key, problem, fix = "", "", ""
    if moe.ffn_hidden_size != width:
        key, fix = "moe.ffn_hidden_size", f"{width}"
        problem = f"{moe.ffn_hidden_size}, but each expert starts as the dense FFN, which is {width} wide"
    elif moe.shared_expert_size not in (0, width):
        key, fix = "moe.shared_expert_size", f"{width}, or 0 for none"
        problem = f"{moe.shared_expert_size}, but it starts as the dense FFN, which is {width} wide"
    elif moe.router_topk == 1:
        key, fix = "moe.router_topk", "2 or more"
        problem = "1: the probability of a single expert is not 1, which changes the function of the dense weights"
    elif moe.capacity_factor is not None:
        key, fix = "moe.capacity_factor", "null, which drops no token"
        problem = f"{moe.capacity_factor}: dropped tokens would miss the FFN of the dense weights"
    if key:
        raise InputError(problem, fix=fix, key=key)


def _warnings(source: Config, config: Config) -> Iterator[str]:
    here, there = config.quant.groups, source.quant.groups
    if here != there:
        yield (
            f"quant.groups={here}, but the weights were trained with {there}: "
            "the same weights now have other scales, so the first loss may be higher"
        )
    factor, is_exact = _scaling_factor(config.moe), config.run.precision is Precision.fp32
    if is_upcycled(source, config) and not is_exact and math.frexp(factor)[0] != 0.5:
        yield (
            f"moe.scaling_factor={factor} is no power of two: weights divided by it are rounded to bf16, some "
            "ternary codes change, and the first loss differs a little from the dense model's"
        )


def _scaling_factor(moe: MoEConfig) -> float:
    return 1.0 if moe.scaling_factor is None else moe.scaling_factor


def _identity(config: Config) -> dict[str, Any]:
    """What makes a model the one it is, by key; null is replaced by what it means."""
    model, moe = config.model, config.moe
    identity = {
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": num_query_groups(model),
        "model.head_dim": head_dim(model),
        "model.vocab_size": model.vocab_size,
        "model.vocab_multiple": model.vocab_multiple,
        "model.activation": model.activation.value,
        "model.sub_norm": model.sub_norm,
        "model.norm_eps": model.norm_eps,
        "model.rope_theta": model.rope_theta,
        "model.tie_embeddings": model.tie_embeddings,
        "quant.weights": config.quant.weights.value,
    }
    if not moe.num_experts:
        return identity | {"model.ffn_hidden_size": model.ffn_hidden_size}
    return identity | {
        "moe.num_experts": moe.num_experts,
        "moe.router_topk": moe.router_topk,
        "moe.ffn_hidden_size": moe.ffn_hidden_size,
        "moe.shared_expert_size": moe.shared_expert_size,
        "moe.score": moe.score.value,
        "moe.expert_bias": moe.expert_bias,
        "moe.scaling_factor": _scaling_factor(moe),
    }


def _text(value: Any) -> str:
    """A value as one would write it on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
