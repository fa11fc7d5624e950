"""How groups lie on ranks, and which format and top-K each role has."""

import pytest

from bitmoe.config.choices import ActFormat, WeightFormat
from bitmoe.config.schema import BitStage, QuantConfig
from bitmoe.quant.policy import QuantPolicy, split_groups


@pytest.mark.parametrize(
    ("groups", "ranks", "split"),
    [(1, 1, (1, False)), (4, 1, (4, False)), (4, 2, (2, False)), (4, 4, (1, False)), (1, 2, (1, True))],
)
def test_split_groups(groups, ranks, split):
    assert split_groups(groups, ranks) == split


@pytest.mark.parametrize(("groups", "ranks"), [(2, 4), (3, 2), (4, 3)])
def test_groups_that_do_not_fit(groups, ranks):
    with pytest.raises(ValueError, match=f"quant.groups = {groups} is neither 1 nor a multiple of {ranks}"):
        split_groups(groups, ranks)


def test_formats_follow_the_stage():
    later = BitStage(start=0.5, qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.fp4)
    policy = QuantPolicy(QuantConfig(stages=[BitStage(), later]))
    roles = ("qkv", "o", "gate_up", "down")
    assert [policy.act_format(role) for role in roles] == [ActFormat.int8] * 4
    assert [policy.keep(role) for role in roles] == [1.0] * 4
    policy.stage = later
    assert [policy.act_format(role) for role in roles] == [
        ActFormat.int4,
        ActFormat.int8,
        ActFormat.fp4,
        ActFormat.int8,
    ]
    assert [policy.keep(role) for role in roles] == [1.0, 0.5, 1.0, 1.0]
    assert policy.is_ternary
    assert not QuantPolicy(QuantConfig(weights=WeightFormat.none)).is_ternary
