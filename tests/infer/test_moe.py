"""Both ways through the routed experts, and which experts they touch."""

import pytest
import torch

from bitmoe.infer.moe import gathered_experts, looped_experts
from bitmoe.infer.packed_linear import linear_input


@pytest.fixture(params=["softmax experts", "softmax experts in 2 groups", "sigmoid experts", "unquantized experts"])
def layer(request, configs, make_pair):
    return make_pair(configs[request.param]).model.model.layers[0].mlp


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_gathered_is_looped(layer, num_tokens):
    x = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(0))
    routes = layer.router(x)
    x = linear_input(x, layer.config, "gate_up")
    looped, gathered = (mix(layer.experts, x, *routes) for mix in (looped_experts, gathered_experts))
    torch.testing.assert_close(gathered, looped, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_idle_experts_are_not_touched(layer):
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    wanted, (_, experts) = layer(x), layer.router(x)
    idle = [expert for expert in range(layer.config.num_experts) if expert not in experts[0]]
    assert idle
    for linear in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj):
        for tensor in linear.state_dict().values():
            tensor[idle] = 255 if tensor.dtype == torch.uint8 else float("nan")
    assert torch.equal(layer(x), wanted)
