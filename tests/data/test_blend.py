"""Blends: shares at every prefix, sample numbers within parts, refusals."""

import numpy as np
import pytest

from bitmoe.config.errors import InputError
from bitmoe.data.blend import LONGEST_CYCLE, Blend

# Plain error diffusion is off by more than one sample on the last.
WEIGHTS = [[1], [0.3, 0.7], [1, 1, 1], [0.37, 0.21, 0.42], [0.5, *[0.05] * 10], [3, 1, 3, 9, 1, 9, 9, 9, 2]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_blend_is_within_one_sample_at_every_prefix(weights):
    parts, _ = Blend(weights).locate(np.arange(5000))
    drawn = np.cumsum(parts[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, 5001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(drawn - due).max() < 1


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_blend_numbers_each_part_without_gaps(weights):
    parts, numbers = Blend(weights).locate(np.arange(5000))
    for part in range(len(weights)):
        own = numbers[parts == part]
        assert np.array_equal(own, np.arange(len(own)))


def test_blend_needs_no_history():
    blend = Blend([0.3, 0.7])
    late = blend.locate(np.arange(10**9, 10**9 + 10))
    early = blend.locate(np.arange(10))
    assert np.array_equal(late[0], early[0])
    assert late[1][0] in (3 * 10**8, 7 * 10**8)


def test_blend_rounds_uneven_weights_to_the_longest_cycle():
    weights = np.array([0.123456789, 0.5, 1.23456789])
    counts = Blend(weights.tolist()).counts
    assert counts.sum() == LONGEST_CYCLE
    assert np.abs(counts - weights / weights.sum() * LONGEST_CYCLE).max() < 1


def test_blend_refuses_a_weight_that_would_vanish():
    with pytest.raises(InputError, match=r"data.weights: weight 1e-09"):
        Blend([1.0, 1e-9])
