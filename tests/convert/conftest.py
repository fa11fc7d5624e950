"""Small models in memory, under the names of a checkpoint, as a ``WeightSource`` reads them."""

from collections import Counter

import pytest
import torch

from bitmoe.config.compose import compose
from bitmoe.model.export_names import slots, split
from bitmoe.model.sizes import with_vocab_size

SMALL = [
    *("model.hidden_size=256", "model.num_layers=2", "model.num_attention_heads=8", "model.num_query_groups=4"),
    *("model.ffn_hidden_size=512", "model.activation=swiglu", "model.sub_norm=false", "model.tie_embeddings=false"),
    *("quant=a8", "quant.groups=1", "parallel=single"),
]
GGUF_MODELS = {
    "dense": [*SMALL, "moe=none"],
    "two_groups": [*SMALL, "moe=none", "quant.groups=2", "model.num_attention_heads=16", "model.head_dim=32"],
    "experts": [*SMALL, "moe.num_experts=4", "moe.ffn_hidden_size=256", "moe.shared_expert_size=0"],
    "sub_norms": [*SMALL, "moe=none", "model.sub_norm=true", "model.tie_embeddings=true"],
}


class WeightsInMemory:
    """``weights`` are what ``ReferenceModel`` takes: global tensors by their checkpoint names, layers stacked."""

    def __init__(self, config, weights):
        self.config, self.weights = config, weights
        self._slots = {name: slot for slot in slots(config) for name in slot.names}

    def read_slot(self, slot, expert=None):
        tensor = self.weights[slot.key].detach()
        tensor = tensor if slot.layer is None else tensor[slot.layer]
        return tensor if expert is None else tensor[expert]

    def read(self, name, expert=None):
        slot = self._slots[name]
        return split(slot, self.read_slot(slot, expert), self.config)[name]


def random_model(overrides):
    """Norms beside one, everything else small."""
    config = with_vocab_size(compose(overrides))
    generator = torch.Generator().manual_seed(7)
    stacked = Counter(slot.key for slot in slots(config))
    weights = {}
    for slot in slots(config):
        shape = slot.shape if slot.layer is None else (stacked[slot.key], *slot.shape)
        noise = torch.randn(shape, generator=generator)
        weights.setdefault(slot.key, 1 + 0.1 * noise if "norm" in slot.key else 0.02 * noise)
    return WeightsInMemory(config, weights)


@pytest.fixture
def dense_model():
    """``dense_model(*overrides)``: random, SwiGLU without sub-norms, 8-bit inputs, the byte tokenizer."""
    return lambda *overrides: random_model([*GGUF_MODELS["dense"], *overrides])


@pytest.fixture(params=GGUF_MODELS)
def gguf_model(request):
    """One of each kind of model that llama.cpp can express, random."""
    return random_model(GGUF_MODELS[request.param])
