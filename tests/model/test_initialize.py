"""Initial values: normal, and a function of seed, name and global index alone."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from bitmoe.config.schema import ModelConfig
from bitmoe.model.initialize import global_index, initialize, normal_at

MODEL = ModelConfig(num_layers=8, init_std=0.02)


def initialized(name, shape, offsets=(), seed=1, dtype=torch.float32):
    """Part of a parameter after ``initialize``; ``offsets`` as megatron-core's (dimension, part, parts)."""
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
    initialize({"any": ShardedTensor.from_rank_offsets(name, parameter, *offsets)}, MODEL, seed)
    return parameter.detach()


def test_normal_numbers():
    x = normal_at(torch.arange(1_000_000), stream=12345)
    assert x.dtype == torch.float64
    # Five standard errors of each moment.
    assert abs(x.mean()) < 5e-3
    assert abs(x.var() - 1) < 5 * 2**0.5 * 1e-3
    assert abs(x.pow(3).mean()) < 5 * 15**0.5 * 1e-3
    assert abs(x.pow(4).mean() - 3) < 5 * 96**0.5 * 1e-3
    for bound, share in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        assert abs((x.abs() < bound).double().mean() - share) < 5 * (share * (1 - share)) ** 0.5 * 1e-3
    neighbours, other_stream = (x[1:] * x[:-1]).mean(), (x * normal_at(torch.arange(1_000_000), 12346)).mean()
    assert abs(neighbours) < 5e-3
    assert abs(other_stream) < 5e-3
    assert x.abs().max() < 7


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_slice_gets_the_values_of_the_whole(dim):
    whole = initialized("experts.fc1_weight", (4, 6, 8))
    for part, wanted in enumerate(whole.chunk(2, dim)):
        assert torch.equal(initialized("experts.fc1_weight", wanted.shape, [(dim, part, 2)]), wanted)


def test_cuts_in_two_dimensions_and_layers_in_front():
    whole = initialized("w", (3, 4, 6))
    parameter = torch.nn.Parameter(torch.empty(2, 3))
    offsets = [(0, 2, 3), (1, 1, 2), (2, 0, 2)]
    shard = ShardedTensor.from_rank_offsets("w", parameter, *offsets, prepend_axis_num=1)
    initialize({"any": shard}, MODEL, seed=1)
    assert torch.equal(parameter.detach(), whole[2, 2:, :3])
    assert global_index(shard, torch.tensor([0, 5])).tolist() == [2 * 24 + 2 * 6, 2 * 24 + 3 * 6 + 2]


def test_standard_deviation_by_name():
    shape = (200, 200)
    assert initialized("mlp.linear_fc1.weight", shape).std() == pytest.approx(0.02, rel=0.02)
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight", "mlp.experts.fc2_weight"):
        assert initialized(name, shape).std() == pytest.approx(0.02 / 4, rel=0.02)
    for name in ("input_layernorm.weight", "linear_fc2.sub_norm.weight", "experts.sub_norm_weight"):
        assert torch.equal(initialized(name, shape), torch.ones(shape))


def test_depends_on_name_and_seed():
    value = initialized("a", (8, 8))
    assert torch.equal(initialized("a", (8, 8)), value)
    assert not torch.equal(initialized("b", (8, 8)), value)
    assert not torch.equal(initialized("a", (8, 8), seed=2), value)
    assert torch.equal(initialized("a", (8, 8), dtype=torch.bfloat16), value.bfloat16())


def test_buffers_are_left_alone():
    buffer = torch.full((4,), 7.0)
    initialize({"bias": ShardedTensor.from_rank_offsets("router.expert_bias", buffer)}, MODEL, seed=1)
    assert torch.equal(buffer, torch.full((4,), 7.0))
