"""What is read off curves: smoothed lines, differences of two runs, means and held-out losses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from curve_runs import BASE, MODELS, VARIANTS
from pack import Curve

from bitmoe.config.from_dict import config_from_dict
from bitmoe.model.counts import active_parameters, model_weights, total_parameters
from bitmoe.model.sizes import with_vocab_size
from bitmoe.train.plot import smooth

# Shapes: N = logged steps.

TOLERANCE = 0.01
"""Nats that the curves of two backwards may differ by."""
LAST_STEPS = 200


@dataclass(frozen=True)
class Line:
    """Values at some steps, in nats per token."""

    steps_N: np.ndarray
    values_N: np.ndarray

    @classmethod
    def of(cls, curve: Curve, key: str) -> Line:
        """The records of a run that hold ``key``: lm_loss, or val_loss for the held-out text."""
        points = [(record["step"], record[key]) for record in curve.records if key in record]
        return cls(np.array([step for step, _ in points], dtype=int), np.array([value for _, value in points], float))

    def smoothed(self) -> Line:
        """Averaged over a twentieth of the line, without lag."""
        return replace(self, values_N=smooth(self.values_N)) if len(self) else self

    def minus(self, other: Line) -> Line:
        """The difference at the steps that both have."""
        steps, ours, theirs = np.intersect1d(self.steps_N, other.steps_N, return_indices=True)
        return Line(steps, self.values_N[ours] - other.values_N[theirs])

    def after(self, step: float) -> Line:
        """The part behind a step."""
        behind = self.steps_N > step
        return Line(self.steps_N[behind], self.values_N[behind])

    def every(self, count: int) -> Line:
        """About ``count`` of its points, the last among them."""
        stride = max(1, -(-len(self) // count))
        return Line(self.steps_N[::-1][::stride][::-1], self.values_N[::-1][::stride][::-1])

    def __len__(self) -> int:
        return len(self.steps_N)


@dataclass(frozen=True)
class Comparison:
    """A run beside the one that the others are compared with; differences are empty for that one and without it."""

    curve: Curve
    training: Line
    held_out: Line
    training_difference: Line
    held_out_difference: Line

    @property
    def label(self) -> str:
        """What to call it."""
        return VARIANTS[self.curve.variant].label

    @property
    def last_step(self) -> int:
        """The last step it logged, 0 if none."""
        return int(self.training.steps_N[-1]) if len(self.training) else 0

    @property
    def last_loss(self) -> float | None:
        """Mean training loss of the last steps."""
        return _mean(self.training.after(self.last_step - LAST_STEPS))

    @property
    def last_difference(self) -> float | None:
        """Mean difference of the training losses of the last steps."""
        return _mean(self.training_difference.after(self.last_step - LAST_STEPS))

    @property
    def largest_difference(self) -> float | None:
        """How far the smoothed curves are apart at most, from a tenth of the run on."""
        values = self.training_difference.smoothed().after(self.last_step / 10).values_N
        return float(np.abs(values).max()) if len(values) else None


def comparisons(curves: list[Curve]) -> dict[str, list[Comparison]]:
    """Of each model that has any loss, its runs in the order of the variants."""
    found = {}
    for model in MODELS:
        ours = {c.variant: c for c in curves if c.model == model and any("lm_loss" in r for r in c.records)}
        if ours:
            base = ours.get(BASE)
            found[model] = [_compared(ours[variant], base) for variant in VARIANTS if variant in ours]
    return found


def parameter_counts(curve: Curve) -> tuple[int, int]:
    """Parameters of a run's model: all, and those that one token uses."""
    config = with_vocab_size(config_from_dict(curve.config))
    weights = model_weights(config)
    return total_parameters(weights), active_parameters(weights, config)


def model_title(curve: Curve) -> str:
    """What kind of model it is and how large."""
    total, active = parameter_counts(curve)
    kind = "mixture of experts" if active < total else "dense"
    size = f"{total / 1e6:.1f}M parameters"
    return f"{kind}, {size}, {active / 1e6:.1f}M active" if active < total else f"{kind}, {size}"


def _compared(curve: Curve, base: Curve | None) -> Comparison:
    lines = Line.of(curve, "lm_loss"), Line.of(curve, "val_loss")
    empty = Line(np.array([], dtype=int), np.array([]))
    if base is None or base is curve:
        return Comparison(curve, *lines, empty, empty)
    others = Line.of(base, "lm_loss"), Line.of(base, "val_loss")
    return Comparison(curve, *lines, *(line.minus(other) for line, other in zip(lines, others, strict=True)))


def _mean(line: Line) -> float | None:
    return float(line.values_N.mean()) if len(line) else None
