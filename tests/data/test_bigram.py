"""Bigram entropy of sequences whose entropy is known."""

import math

import numpy as np
import pytest

from bitmoe.data.bigram import bigram_entropy


def test_bigram_entropy_of_a_cycle_is_zero():
    assert bigram_entropy(np.tile([3, 1, 4, 5], 50)) == 0


def test_bigram_entropy_by_hand():
    # Pairs: 0->0, 0->1, 1->0, 0->1. After 0: one 0, two 1s; after 1: always 0.
    expected = (1 * math.log(3) + 2 * math.log(3 / 2)) / 4
    assert bigram_entropy(np.array([0, 0, 1, 0, 1])) == pytest.approx(expected, rel=1e-12)


def test_bigram_entropy_of_uniform_tokens_is_log_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 8, 200_000)
    # The empirical entropy is below by about V * (V - 1) / (2 * N) = 1.4e-4.
    assert bigram_entropy(tokens) == pytest.approx(math.log(8), abs=1e-3)


def test_bigram_entropy_of_a_markov_chain():
    chosen = np.random.default_rng(1)
    steps = chosen.random(100_000) < 0.9
    # Each token stays with probability 0.9, else moves on to the next of five.
    tokens = np.cumsum(~steps) % 5
    expected = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert bigram_entropy(tokens) == pytest.approx(expected, rel=0.02)


def test_bigram_entropy_forms_no_pairs_across_rows():
    assert bigram_entropy(np.array([[0, 1], [0, 1], [2, 2]])) == 0
    assert bigram_entropy(np.array([0, 1, 0, 1, 2, 2])) > 0


def test_bigram_entropy_of_large_ids():
    assert bigram_entropy(np.tile([250_000, 249_999], 10).astype(np.int32)) == 0


def test_bigram_entropy_needs_a_pair():
    with pytest.raises(ValueError, match="hold no pair"):
        bigram_entropy(np.array([1]))
