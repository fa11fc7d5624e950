"""Learning rate and weight decay as functions of the optimizer step.

``two_stage`` is the curve BitNet b1.58 published and BitNet a4.8 follows: linear warm-up to the peak, then
linear decay to ``lr_end`` at the last step; at the switch (half of the run) the curve changes to the one that
a run with the lower second peak would be on, and weight decay is removed. Pure functions of the step: nothing
to save, nothing to restore. Steps count from 1: ``learning_rate(1, ...)`` is what the first optimizer step
uses, and the last step, ``run.steps``, uses exactly ``lr_end``.
"""

import math

from bitmoe.config.choices import Schedule
from bitmoe.config.schema import OptimConfig
from bitmoe.quant.bit_schedule import first_step


def switch_step(optim: OptimConfig, steps: int) -> int | None:
    """First step of the second stage of weight decay and two-stage learning rate; None if there is none."""
    return first_step(optim.switch, steps) if optim.switch < 1 else None


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """Learning rate of one optimizer step.

    After warm-up, with T = ``steps`` and W = ``warmup_steps``, ``two_stage`` is
    ``lr_end + (peak - lr_end) * (T - step) / (T - W)``, where peak is ``lr`` before the switch and
    ``lr_second`` from it on ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", figure 1c). ``linear`` is
    the same without the switch, ``cosine`` half a cosine from ``lr`` to ``lr_end``, ``constant`` stays at
    ``lr``. A warm-up longer than the run is cut off by its end.

    Args:
        step: optimizer step, from 1 to ``steps``.
        optim: peaks, end, warm-up and curve.
        steps: optimizer steps of the run.

    Raises:
        ValueError: ``step`` is not a step of the run.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step {step} is not one of the run's steps 1 to {steps}")
    peak = optim.lr
    if optim.schedule is Schedule.two_stage and optim.lr_second is not None and _switched(step, optim, steps):
        peak = optim.lr_second
    if step <= optim.warmup_steps:
        return peak * step / optim.warmup_steps
    if optim.schedule is Schedule.constant:
        return peak
    remaining = (steps - step) / (steps - optim.warmup_steps)
    if optim.schedule is Schedule.cosine:
        remaining = 0.5 * (1 - math.cos(math.pi * remaining))
    return optim.lr_end + (peak - optim.lr_end) * remaining


def weight_decay(step: int, optim: OptimConfig, steps: int) -> float:
    """Weight decay of one optimizer step, from 1: ``weight_decay``, then ``weight_decay_second``."""
    return optim.weight_decay_second if _switched(step, optim, steps) else optim.weight_decay


def _switched(step: int, optim: OptimConfig, steps: int) -> bool:
    switch = switch_step(optim, steps)
    return switch is not None and step >= switch
