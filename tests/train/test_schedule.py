"""Learning rate and weight decay against the published curve and at every border."""

import math

import pytest

from bitmoe.config.choices import Schedule
from bitmoe.config.schema import OptimConfig
from bitmoe.train.schedule import learning_rate, switch_step, weight_decay

STEPS = 100_000
PAPER = OptimConfig()


@pytest.mark.parametrize(
    ("step", "published"), [(375, 1.5e-3), (49_950, 7.68e-4), (50_050, 5.16e-4), (100_000, 3.0e-5)]
)
def test_learning_rate_of_the_700m_model(step, published):
    # The published figures have three digits.
    assert learning_rate(step, PAPER, STEPS) == pytest.approx(published, rel=1e-3)


def test_learning_rate_switches_at_half_of_the_run():
    before, after = (learning_rate(step, PAPER, STEPS) for step in (49_999, 50_000))
    assert before == pytest.approx(3e-5 + 1.47e-3 * 50_001 / 99_625, rel=1e-12)
    assert after == pytest.approx(3e-5 + 0.97e-3 * 50_000 / 99_625, rel=1e-12)


def test_learning_rate_last_step_is_lr_end_exactly():
    assert learning_rate(STEPS, PAPER, STEPS) == 3e-5


def test_learning_rate_warm_up_is_linear_from_the_first_step():
    rates = [learning_rate(step, PAPER, STEPS) for step in range(1, 376)]
    assert rates == pytest.approx([1.5e-3 * step / 375 for step in range(1, 376)], rel=1e-12)
    assert learning_rate(376, PAPER, STEPS) < rates[-1]


def test_learning_rate_without_second_peak_has_no_drop():
    one_peak = OptimConfig(lr_second=None)
    linear = OptimConfig(schedule=Schedule.linear)
    for step in (1, 49_999, 50_000, 99_999):
        assert learning_rate(step, one_peak, STEPS) == learning_rate(step, linear, STEPS)


@pytest.mark.parametrize(("schedule", "expected"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_learning_rate_at_mid_decay(schedule, expected):
    optim = OptimConfig(lr=1.0, lr_end=0.1, warmup_steps=20, schedule=Schedule(schedule))
    assert learning_rate(60, optim, 100) == pytest.approx(expected)


def test_learning_rate_cosine_is_a_half_period():
    optim = OptimConfig(lr=1.0, lr_end=0.0, warmup_steps=0, schedule=Schedule.cosine)
    assert learning_rate(25, optim, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(100, optim, 100) == 0.0


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup", [0, 9, 10, 500])
def test_learning_rate_is_positive_and_bounded_with_any_warm_up(schedule, warmup):
    optim = OptimConfig(lr=1e-3, lr_second=5e-4, warmup_steps=warmup, schedule=schedule)
    rates = [learning_rate(step, optim, 10) for step in range(1, 11)]
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_learning_rate_of_one_step():
    assert learning_rate(1, PAPER, 1) == pytest.approx(1e-3 / 375)
    assert learning_rate(1, OptimConfig(warmup_steps=0), 1) == 3e-5


@pytest.mark.parametrize("step", [0, 101])
def test_learning_rate_refuses_steps_outside_the_run(step):
    with pytest.raises(ValueError, match="1 to 100"):
        learning_rate(step, PAPER, 100)


def test_weight_decay_is_removed_at_the_switch():
    assert [weight_decay(step, PAPER, STEPS) for step in (1, 49_999, 50_000, STEPS)] == [0.1, 0.1, 0.0, 0.0]


def test_switch_of_one_never_comes():
    optim = OptimConfig(switch=1.0)
    assert switch_step(optim, 100) is None
    assert weight_decay(100, optim, 100) == 0.1
    assert learning_rate(99, optim, 100) == learning_rate(99, OptimConfig(schedule=Schedule.linear), 100)
