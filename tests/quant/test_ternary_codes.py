"""Ternary codes: made once per parameter value, by groups that may be of different size or lie on several ranks."""

import pytest
import torch
import torch.distributed as dist

from bitmoe.config.schema import QuantConfig
from bitmoe.quant.policy import QuantPolicy
from bitmoe.quant.ternary_codes import CodeCache, absmean_blocks, absmean_columns, absmean_rows
from bitmoe_kernels.weight_quant import ternarize

# Shapes: O = output rows, I = input columns, E = experts.


def random_weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def codes_and_scale(weight_and_scale, **layout):
    """What a cache of one parameter value returns."""
    weight, scale = weight_and_scale
    rows, columns, scale = CodeCache(QuantPolicy(QuantConfig()), "o", lambda: (weight, scale)).operands(**layout)
    return (rows, columns, scale) if layout else (rows, scale)


def test_rows_of_unequal_projections():
    """With grouped queries q has more rows than k and v: each scale is the mean over its own rows."""
    w_OI, ids_O = random_weight(16, 8), torch.tensor([0, 0, 1, 2] * 2).repeat_interleave(2)
    w_OI[ids_O == 1] *= 3
    codes_OI, scale_O = codes_and_scale(absmean_rows(w_OI, ids_O, num_scales=3, reduce_group=None))
    for projection in range(3):
        rows = ids_O == projection
        wanted_codes, wanted_scale = ternarize(w_OI[rows])
        assert torch.equal(codes_OI[rows], wanted_codes)
        assert torch.equal(scale_O[rows], wanted_scale.expand(int(rows.sum())))


def test_rows_of_every_expert():
    """One map of rows to scales serves all experts, whose scales are their own; transposed codes are, too."""
    w_EOI = random_weight(3, 4, 8) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    ids_O = torch.tensor([1, 0, 1, 0])
    scaled = absmean_rows(w_EOI, ids_O, num_scales=2, reduce_group=None)
    codes_EOI, columns_EIP, scale_EO = codes_and_scale(scaled, with_columns=True)
    for expert, w_OI in enumerate(w_EOI):
        wanted_codes, wanted_scale = codes_and_scale(absmean_rows(w_OI, ids_O, 2, None))
        assert torch.equal(codes_EOI[expert], wanted_codes)
        assert torch.equal(scale_EO[expert], wanted_scale)
    assert columns_EIP.shape == (3, 8, 16)
    assert torch.equal(columns_EIP[..., :4].to(torch.int8), codes_EOI.transpose(1, 2))


def test_columns_of_every_expert():
    w_EOI = random_weight(3, 4, 8) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    codes_EOI, scale_EG = codes_and_scale(absmean_columns(w_EOI, groups=2, reduce_group=None))
    for w_OI, codes_OI, scale_G in zip(w_EOI, codes_EOI, scale_EG, strict=True):
        wanted_codes, wanted_scale = ternarize(w_OI, groups=2, dim=1)
        assert torch.equal(codes_OI, wanted_codes)
        assert torch.equal(scale_G, wanted_scale)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1)])
def test_one_row_or_one_group(shape):
    """The shape of the scales tells rows from columns, also where there is one."""
    w_OI = random_weight(*shape)
    rows = codes_and_scale(absmean_rows(w_OI, torch.arange(shape[0]), shape[0], None))
    columns = codes_and_scale(absmean_columns(w_OI, shape[1], None))
    for got, dim in ((rows, 0), (columns, 1)):
        wanted = ternarize(w_OI, groups=shape[dim], dim=dim)
        assert all(torch.equal(tensor, expected) for tensor, expected in zip(got, wanted, strict=True))


def ternarize_parts(w_OI, ids_O):
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    rows = absmean_rows(w_OI.chunk(ranks)[rank], ids_O.chunk(ranks)[rank], 3, group)
    columns = absmean_columns(w_OI.chunk(ranks, 1)[rank], 1, group)
    return codes_and_scale(rows), codes_and_scale(columns)


def test_one_group_over_two_ranks_gives_the_same_codes(ranks):
    w_OI, ids_O = random_weight(16, 8), torch.tensor([0, 0, 1, 2] * 2).repeat_interleave(2)
    codes_OI, scale_O = codes_and_scale(absmean_rows(w_OI, ids_O, 3, None))
    column_codes_OI, column_scale_1 = codes_and_scale(absmean_columns(w_OI, 1, None))
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
        return absmean_columns(weight, 1, None)

    return CodeCache(policy, "down", make), policy, weight, made


def test_codes_are_made_once_per_parameter_value(counted):
    cache, policy, weight, made = counted
    assert made == []
    codes, scale = cache.get()
    assert cache.get()[0] is codes
    assert made == [False]
    former = codes.clone()
    with torch.no_grad():
        weight.mul_(-1)
    assert cache.get()[0] is codes
    policy.parameters_changed()
    assert torch.equal(cache.get()[0], -former)
    assert torch.equal(cache.get()[1], scale)
    assert len(made) == 2


def test_another_layout_is_made_from_the_same_value(counted):
    """Asking for columns or for another type makes codes again; asking for less than there is does not."""
    cache, _, _, made = counted
    rows, columns, scale = cache.operands()
    assert columns is None
    with_columns = cache.operands(with_columns=True)
    assert torch.equal(with_columns.rows, rows)
    assert torch.equal(with_columns.columns[:, :8].to(torch.int8), rows.T)
    assert torch.equal(with_columns.scale, scale)
    assert cache.operands().rows is with_columns.rows
    assert len(made) == 2
    e4m3 = cache.operands(torch.float8_e4m3fn)
    assert e4m3.rows.dtype == torch.float8_e4m3fn
    assert torch.equal(e4m3.rows.to(torch.int8), rows)
    assert torch.equal(cache.get()[0], rows)
    assert len(made) == 4


@pytest.mark.parametrize("dim", [0, 1])
def test_scales_of_a_new_value_take_the_place_of_the_former(dim):
    """A recorded pass reads them there: of each output for blocks of rows, of each block of columns."""
    policy, w_EOI = QuantPolicy(QuantConfig()), random_weight(3, 4, 8)
    cache = CodeCache(policy, "down", lambda: absmean_blocks(w_EOI, 2, dim, None))
    former = cache.get()[1]
    place, former = former.data_ptr(), former.clone()
    w_EOI *= 3
    policy.parameters_changed()
    _, scale = cache.get()
    assert scale.data_ptr() == place
    assert scale.shape == ((3, 4) if dim == 0 else (3, 2))
    wanted_EG = ternarize(w_EOI, groups=2, dim=dim)[1]
    assert torch.equal(scale, wanted_EG.repeat_interleave(2, 1) if dim == 0 else wanted_EG)
    assert not torch.equal(scale, former)


def test_codes_are_counted_once_per_parameter_value(counted):
    """However many layouts are made of it; a change of type between values does not hide what flipped."""
    cache, policy, weight, _ = counted
    policy.statistics.recording = True
    zeros = int((cache.get()[0] == 0).sum())
    cache.operands(torch.float8_e4m3fn, with_columns=True)
    assert policy.statistics.collect(torch.device("cpu")) == {"zeros/down": zeros / 64, "flips/down": 0.0}
    with torch.no_grad():
        weight.mul_(-1)
    policy.parameters_changed()
    cache.get()
    expected = {"zeros/down": zeros / 64, "flips/down": (64 - zeros) / 64}
    assert policy.statistics.collect(torch.device("cpu")) == expected


def test_codes_of_steps_that_are_not_logged_are_not_counted(counted):
    """Those of an evaluation are: the step after it makes none."""
    cache, policy, weight, _ = counted
    for counts, is_training in ((False, True), (True, False)):
        with torch.no_grad():
            weight.mul_(-1)
        policy.parameters_changed()
        with torch.set_grad_enabled(is_training):
            zeros = int((cache.get()[0] == 0).sum())
        shares = policy.statistics.collect(torch.device("cpu"))
        assert shares == ({"zeros/down": zeros / 64, "flips/down": (64 - zeros) / 64} if counts else {})
