"""Shares of zeros, clipped codes and flips are counted as they are, over calls, and start anew."""

import pytest
import torch

from bitmoe.config.choices import ActFormat
from bitmoe.quant.statistics import QuantStatistics

CPU = torch.device("cpu")


def int8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


@pytest.fixture
def statistics(monkeypatch) -> QuantStatistics:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    return QuantStatistics()


def test_activations_are_counted_while_recording(statistics):
    statistics.add_activations("qkv", int8(0, 0, 1, 7), ActFormat.int4)
    assert statistics.collect(CPU) == {}
    statistics.recording = True
    statistics.add_activations("qkv", int8(0, -8, 7, 6), ActFormat.int4)
    statistics.add_activations("qkv", int8(0, 0, 0, -7), ActFormat.int4)
    statistics.add_activations("down", int8(127, -128, 126, -127), ActFormat.int8)
    statistics.add_activations("o", int8(0), ActFormat.none)
    expected = {"sparsity/qkv": 4 / 8, "clipped/qkv": 2 / 8, "sparsity/down": 0.0, "clipped/down": 2 / 4}
    assert statistics.collect(CPU) == expected
    assert statistics.collect(CPU) == {}


def test_activations_may_be_float8(statistics):
    statistics.recording = True
    statistics.add_activations("qkv", int8(0, -8, 7, 6).to(torch.float8_e4m3fn), ActFormat.int4)
    assert statistics.collect(CPU) == {"sparsity/qkv": 1 / 4, "clipped/qkv": 2 / 4}


def test_weights_are_added_up(statistics):
    statistics.add_weights("o", torch.tensor([2, 0, 4]))
    assert statistics.collect(CPU) == {"zeros/o": 0.5, "flips/o": 0.0}
    statistics.add_weights("o", torch.tensor([0, 2, 4]))
    statistics.add_weights("o", torch.tensor([6, 1, 12]))
    statistics.add_weights("down", torch.tensor([1, 1, 1]))
    assert statistics.collect(CPU) == {"zeros/o": 6 / 16, "flips/o": 3 / 16, "zeros/down": 1.0, "flips/down": 1.0}
    assert statistics.collect(CPU) == {}
