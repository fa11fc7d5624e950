"""Parameters and FLOPs of a model: arithmetic over its config, without torch.

Every weight is listed once, with its shape and the ranks it is cut over; sums over that list give totals, what one
token uses (of the routed experts only its top-K), and, in ``memory.py``, what a rank holds.

FLOPs are model FLOPs: two for a multiply-add, matrix products only, attention over the keys that a causal mask
leaves; recomputation is not counted. The backward pass costs twice the forward pass.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction

from bitmoe.config.choices import WeightFormat
from bitmoe.config.schema import Config
from bitmoe.model.sizes import head_dim, num_query_groups, padded_vocab_size

TRAINING_PER_FORWARD = 3


class Cut(Enum):
    """The ranks of a pipeline stage among which a weight is divided."""

    nothing = "every rank has a copy"
    tensor = "tensor-parallel ranks"
    expert = "expert and expert-tensor ranks"


@dataclass(frozen=True)
class Weight:
    """A parameter, or several of one shape."""

    component: str
    """Part of the model, as tables name it."""
    shape: tuple[int, ...]
    """Sizes, leading ones (layers, experts) included; a matrix ends in output rows, input columns."""
    cut: Cut
    role: str = ""
    """Of a quantizable linear: qkv, o, gate_up or down."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def layer_weights(config: Config) -> Iterator[Weight]:
    """The weights of one transformer layer."""
    model, moe = config.model, config.moe
    hidden, width = model.hidden_size, head_dim(model)
    queries, keys = model.num_attention_heads * width, num_query_groups(model) * width
    yield Weight("norms", (2, hidden), Cut.nothing)
    yield Weight("attention", (queries + 2 * keys, hidden), Cut.tensor, "qkv")
    yield Weight("attention", (hidden, queries), Cut.tensor, "o")
    if model.sub_norm:
        yield Weight("norms", (queries,), Cut.tensor)
    if not moe.num_experts:
        yield from _feed_forward(config, "FFN", model.ffn_hidden_size, (), Cut.tensor)
        return
    yield Weight("router", (moe.num_experts, hidden), Cut.nothing)
    yield from _feed_forward(config, "routed experts", moe.ffn_hidden_size, (moe.num_experts,), Cut.expert)
    if moe.shared_expert_size:
        yield from _feed_forward(config, "shared expert", moe.shared_expert_size, (), Cut.tensor)


def _feed_forward(config: Config, component: str, width: int, lead: tuple[int, ...], cut: Cut) -> Iterator[Weight]:
    hidden = config.model.hidden_size
    yield Weight(component, (*lead, 2 * width, hidden), cut, "gate_up")
    yield Weight(component, (*lead, hidden, width), cut, "down")
    if config.model.sub_norm:
        yield Weight("norms", (*lead, width), cut)


def embedding(config: Config) -> Weight:
    """The embedding, and of a tied model also the head."""
    return Weight("embedding", (padded_vocab_size(config.model), config.model.hidden_size), Cut.tensor)


def head(config: Config) -> Weight:
    """The matrix that makes logits; where embeddings are tied it is the embedding once more."""
    return replace(embedding(config), component="head")


def final_norm(config: Config) -> Weight:
    """The norm between the last layer and the head."""
    return Weight("norms", (config.model.hidden_size,), Cut.nothing)


def model_weights(config: Config) -> list[Weight]:
    """The weights of the whole model, each once; model.vocab_size must be known."""
    layers = [replace(w, shape=(config.model.num_layers, *w.shape)) for w in layer_weights(config)]
    heads = [] if config.model.tie_embeddings else [head(config)]
    return [embedding(config), *layers, final_norm(config), *heads]


def is_ternary(weight: Weight, config: Config) -> bool:
    """Whether the forward pass multiplies ternary codes of this weight."""
    return bool(weight.role) and config.quant.weights is WeightFormat.ternary


def active_share(weight: Weight, config: Config) -> Fraction:
    """The part of a weight that one token uses: its top-K of the routed experts, all of everything else."""
    return Fraction(config.moe.router_topk, config.moe.num_experts) if weight.cut is Cut.expert else Fraction(1)


def total_parameters(weights: Iterable[Weight]) -> int:
    """Number of parameters."""
    return sum(weight.numel for weight in weights)


def active_parameters(weights: Iterable[Weight], config: Config) -> int:
    """Number of parameters that one token uses."""
    return int(sum(weight.numel * active_share(weight, config) for weight in weights))


def forward_flops(config: Config) -> tuple[int, int]:
    """FLOPs of the forward pass per token of a sequence of context.seq_length.

    Returns:
        those of linears, router and head; those of attention's two products, of which a token takes part with
        (seq_length + 1) / 2 keys on average.
    """
    model = config.model
    matrices = [*(w for w in model_weights(config) if w.role or w.component == "router"), head(config)]
    queries = model.num_attention_heads * head_dim(model)
    attention = 2 * 2 * model.num_layers * queries * (config.context.seq_length + 1) // 2
    return 2 * active_parameters(matrices, config), attention
