"""Stages of the bit schedule: fractions, step numbers, borders, order."""

import pytest

from bitmoe.config.choices import ActFormat
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, QuantConfig
from bitmoe.quant.bit_schedule import first_step, stage_at, stage_name, stage_starts

A48 = {
    "qkv": ActFormat.int4,
    "o": ActFormat.int8,
    "o_keep": 0.5,
    "gate_up": ActFormat.int4,
    "down": ActFormat.int8,
}


def schedule(*starts: float) -> QuantConfig:
    return QuantConfig(stages=[BitStage(), *(BitStage(start=start, **A48) for start in starts)])


@pytest.mark.parametrize(
    ("start", "steps", "expected"),
    [
        (0.0, 100, 1),
        (0.95, 100_000, 95_000),
        (0.95, 10, 10),
        (0.5, 101, 51),
        (1, 100, 1),
        (40, 100, 40),
        (0.07, 100, 7),
        (0.29, 100, 29),
    ],
)
def test_first_step(start, steps, expected):
    assert first_step(start, steps) == expected


def test_stage_at_changes_exactly_at_its_start():
    quant = schedule(0.95)
    assert [stage_at(step, quant, 100)[0] for step in (1, 94, 95, 100)] == [0, 0, 1, 1]
    assert stage_at(94, quant, 100)[1] is quant.stages[0]
    assert stage_at(95, quant, 100)[1] is quant.stages[1]


def test_stage_at_mixes_fractions_and_step_numbers():
    quant = schedule(0.2, 50)
    assert stage_starts(quant, 100) == [1, 20, 50]
    assert [stage_at(step, quant, 100)[0] for step in (19, 20, 49, 50)] == [0, 1, 1, 2]


def test_stage_at_ignores_a_stage_beyond_the_run():
    assert stage_at(100, schedule(5000), 100)[0] == 0


@pytest.mark.parametrize(
    "stages",
    [[], [BitStage(start=0.5)], [BitStage(), BitStage(start=60), BitStage(start=0.5)]],
    ids=["none", "late first", "out of order"],
)
def test_stage_at_refuses(stages):
    with pytest.raises(InputError, match="quant.stages"):
        stage_at(1, QuantConfig(stages=stages), 100)


def test_stage_at_refuses_step_zero():
    with pytest.raises(ValueError, match="count from 1"):
        stage_at(0, QuantConfig(), 100)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (BitStage(), "a8"),
        (BitStage(**A48), "a48"),
        (BitStage(**A48 | {"o_keep": 0.25}), "qkv int4, o int8 top 25%, gate_up int4, down int8"),
        (BitStage(0, ActFormat.none, ActFormat.none, 1.0, ActFormat.none, ActFormat.none), "none"),
    ],
)
def test_stage_name(stage, name):
    assert stage_name(stage) == name
