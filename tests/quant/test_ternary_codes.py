"""Ternary codes: made once per parameter value, by groups that may be of different size or lie on several ranks."""

import pytest
import torch
import torch.distributed as dist

from bitmoe.config.schema import QuantConfig
from bitmoe.quant.policy import QuantPolicy
from bitmoe.quant.ternary_codes import CodeCache, ternarize_columns, ternarize_rows
from bitmoe_kernels.weight_quant import ternarize

# Shapes: O = output rows, I = input columns, E = experts.


def random_weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def test_rows_of_unequal_projections():
    """With grouped queries q has more rows than k and v: each scale is the mean over its own rows."""
    w_OI, ids_O = random_weight(16, 8), torch.tensor([0, 0, 1, 2] * 2).repeat_interleave(2)
    w_OI[ids_O == 1] *= 3
    codes_OI, scale_O = ternarize_rows(w_OI, ids_O, num_scales=3, reduce_group=None)
    for projection in range(3):
        rows = ids_O == projection
        wanted_codes, wanted_scale = ternarize(w_OI[rows])
        assert torch.equal(codes_OI[rows], wanted_codes)
        assert torch.equal(scale_O[rows], wanted_scale.expand(int(rows.sum())))


def test_columns_of_every_expert():
    w_EOI = random_weight(3, 4, 8) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    codes_EOI, scale_EG = ternarize_columns(w_EOI, groups=2, reduce_group=None)
    for w_OI, codes_OI, scale_G in zip(w_EOI, codes_EOI, scale_EG, strict=True):
        wanted_codes, wanted_scale = ternarize(w_OI, groups=2, dim=1)
        assert torch.equal(codes_OI, wanted_codes)
        assert torch.equal(scale_G, wanted_scale)


def ternarize_parts(w_OI, ids_O):
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    rows = ternarize_rows(w_OI.chunk(ranks)[rank], ids_O.chunk(ranks)[rank], 3, group)
    return rows, ternarize_columns(w_OI.chunk(ranks, 1)[rank], 1, group)


def test_one_group_over_two_ranks_gives_the_same_codes(ranks):
    w_OI, ids_O = random_weight(16, 8), torch.tensor([0, 0, 1, 2] * 2).repeat_interleave(2)
    codes_OI, scale_O = ternarize_rows(w_OI, ids_O, 3, None)
    column_codes_OI, column_scale_1 = ternarize_columns(w_OI, 1, None)
    (rows_0, columns_0), (rows_1, columns_1) = ranks(2).run(ternarize_parts, w_OI, ids_O)
    assert torch.equal(torch.cat([rows_0[0], rows_1[0]]), codes_OI)
    assert torch.equal(torch.cat([rows_0[1], rows_1[1]]), scale_O)
    assert torch.equal(torch.cat([columns_0[0], columns_1[0]], 1), column_codes_OI)
    assert torch.equal(columns_0[1], column_scale_1)
    assert torch.equal(columns_1[1], column_scale_1)


@pytest.fixture
def counted():
    """A cache of one weight, its policy, and how often codes were made."""
    policy, made = QuantPolicy(QuantConfig()), []
    weight = torch.nn.Parameter(random_weight(8, 8))

    def make():
        made.append(torch.is_grad_enabled())
        return ternarize_columns(weight, 1, None)

    return CodeCache(policy, "down", make), policy, weight, made


def test_codes_are_made_once_per_parameter_value(counted):
    cache, policy, weight, made = counted
    assert made == []
    codes, scale = cache.get()
    assert cache.get()[0] is codes
    assert made == [False]
    with torch.no_grad():
        weight.mul_(-1)
    assert cache.get()[0] is codes
    policy.parameters_changed()
    assert torch.equal(cache.get()[0], -codes)
    assert torch.equal(cache.get()[1], scale)
    assert len(made) == 2
