"""The same model on a GPU, and decoding as a CUDA graph."""

import pytest
import torch
from transformers import StaticCache

pytestmark = pytest.mark.gpu

NAMES = [
    "a4.8 in 2 groups",
    "wider than a block",
    "softmax experts in 2 groups",
    "sigmoid experts",
    "unquantized experts",
]


def tokens(*shape):
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kv_bits", [16, 3])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_cpu(name, kv_bits, configs, make_pair):
    model = make_pair(configs[name], kv_bits=kv_bits).model
    ids = tokens(2, 24)
    wanted = model(ids, use_cache=True).logits
    got = model.cuda()(ids.cuda(), use_cache=True).logits.cpu()
    # A sum in another order may move a code: a step of one input, not an error of the product.
    assert (got - wanted).norm() / wanted.norm() < 0.02
    assert (got.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.95


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_decodes_as_a_graph(name, configs, make_pair):
    """Capture fails where anything waits for the GPU or a shape depends on data."""
    model = make_pair(configs[name]).model.cuda()
    ids = tokens(1, 12).cuda()
    wanted = model(ids).logits

    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :4], past_key_values=cache, position_ids=torch.arange(4, device="cuda").unsqueeze(0))
    token, position = ids[:, 4:5].clone(), torch.full((1, 1), 4, device="cuda")
    places = torch.arange(32, device="cuda")

    def step():
        mask = (places <= position)[None, None]
        return model(token, past_key_values=cache, position_ids=position, attention_mask=mask).logits

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    for layer in cache.layers:
        layer.cumulative_length.fill_(4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for layer in cache.layers:
        layer.cumulative_length.fill_(4)
    for place in range(4, 12):
        token.copy_(ids[:, place : place + 1])
        position.fill_(place)
        graph.replay()
        error = (logits[:, -1] - wanted[:, place]).norm() / wanted[:, place].norm()
        assert error < 0.02
