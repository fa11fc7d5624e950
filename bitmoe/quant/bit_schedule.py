"""The bit schedule: which activation formats each linear role uses at which optimizer step.

BitNet a4.8 trains first with 8-bit activations and, for the last twentieth of the tokens, with its 4-bit
hybrid, keeping the optimizer state (arXiv 2411.04965, section 3). ``quant.stages`` says so in config; here it
becomes step numbers. Steps count from 1: step 1 is the first optimizer step, ``run.steps`` the last. The
functions are pure, so a resumed run lands in its stage by its step number alone.
"""

import math

from bitmoe.config.choices import ActFormat
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, QuantConfig


def first_step(start: float, steps: int) -> int:
    """First optimizer step of a stage.

    Args:
        start: below 1 a fraction of the run, from 1 on a step number.
        steps: optimizer steps of the run.

    Returns:
        The smallest step, counted from 1, that is not before ``start``.
    """
    step = start if start >= 1 else start * steps
    # 0.07 * 100 is 7.000000000000001 in binary: rounding first keeps such a fraction from starting late.
    return max(1, math.ceil(round(step, 6)))


def stage_starts(quant: QuantConfig, steps: int) -> list[int]:
    """First step of every stage of ``quant.stages``, in order.

    Raises:
        InputError: there is no stage, the first begins after step 1, or the stages are not in order of start.
    """
    starts = [first_step(stage.start, steps) for stage in quant.stages]
    if not starts or starts[0] > 1 or starts != sorted(starts):
        raise InputError(
            f"stages begin at steps {starts} of {steps}",
            fix="begin the first stage at start=0 and list the others in order of start",
            key="quant.stages",
        )
    return starts


def stage_at(step: int, quant: QuantConfig, steps: int) -> tuple[int, BitStage]:
    """The stage that optimizer step ``step`` (from 1) trains in.

    Args:
        step: optimizer step, from 1.
        quant: holds the stages.
        steps: optimizer steps of the run.

    Returns:
        Index of the stage in ``quant.stages`` and the stage.

    Raises:
        InputError: as ``stage_starts``.
        ValueError: ``step`` is below 1.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps count from 1")
    index = sum(start <= step for start in stage_starts(quant, steps)) - 1
    return index, quant.stages[index]


def stage_name(stage: BitStage) -> str:
    """Short name of a stage: ``a8`` and ``a48`` (the paper's two), one format, or formats by role."""
    formats = (stage.qkv, stage.o, stage.gate_up, stage.down)
    if stage.o_keep == 1 and len(set(formats)) == 1:
        return {ActFormat.int8: "a8", ActFormat.int4: "a4"}.get(stage.qkv, stage.qkv.value)
    if stage.o_keep == 0.5 and formats == (ActFormat.int4, ActFormat.int8, ActFormat.int4, ActFormat.int8):
        return "a48"
    keep = "" if stage.o_keep == 1 else f" top {stage.o_keep:.0%}"
    return f"qkv {stage.qkv.value}, o {stage.o.value}{keep}, gate_up {stage.gate_up.value}, down {stage.down.value}"
