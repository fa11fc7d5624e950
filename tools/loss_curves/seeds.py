"""How much the two backwards differ over several seeds: differences of each, their mean, and how far seeds are apart.

One pair of runs shows little: what one rounding changes grows over hundreds of steps to what another seed changes.
Over seeds that averages out, and what a backward itself does to the loss remains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from curve_runs import BASE, EIGHT_BIT, MODELS
from curves import LAST_STEPS, TOLERANCE, Comparison, Line, comparisons, model_title
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pack import Curve

from bitmoe.config.errors import InputError
from bitmoe.train.plot import finish_axis

_SEED, _MEAN, _APART = "#e9a283", "#d9541e", "#777777"


@dataclass(frozen=True)
class Pair:
    """Two runs of a model from one seed, which differ in their backward."""

    base: Comparison
    eight_bit: Comparison

    @property
    def seed(self) -> int:
        """``run.seed`` of both."""
        return self.base.curve.config["run"]["seed"]


def pairs_of(records: Sequence[list[Curve]]) -> dict[str, list[Pair]]:
    """Of each model the pairs in some records, one a record.

    Raises:
        InputError: there is none.
    """
    found: dict[str, list[Pair]] = {}
    for curves in records:
        for model, rows in comparisons(curves).items():
            by_variant = {row.curve.variant: row for row in rows}
            if {BASE, EIGHT_BIT} <= by_variant.keys():
                found.setdefault(model, []).append(Pair(by_variant[BASE], by_variant[EIGHT_BIT]))
    if not found:
        raise InputError(f"no record holds losses of both {BASE} and {EIGHT_BIT}", fix="run both from some seeds")
    return {model: sorted(found[model], key=lambda pair: pair.seed) for model in MODELS if model in found}


def mean(lines: Sequence[Line]) -> Line:
    """The mean of lines at the steps that all of them have."""
    steps_N = lines[0].steps_N
    for line in lines[1:]:
        steps_N = np.intersect1d(steps_N, line.steps_N)
    values = [line.values_N[np.isin(line.steps_N, steps_N)] for line in lines]
    return Line(steps_N, np.mean(values, axis=0))


def seeds_table(pairs: dict[str, list[Pair]]) -> str:
    """Losses with the bf16 backward and differences of the 8-bit one, by seed."""
    lines = []
    for rows in pairs.values():
        lines += ["", f"{model_title(rows[0].base.curve)}; the 8-bit backward beside the bf16 backward, nats per token"]
        lines.append(f"{'seed':>8}{f'last {LAST_STEPS} steps':>26}{'held-out':>26}")
        lines += [f"{row.seed:8}{_cells(_last_losses(row))}" for row in rows]
        means = [tuple(np.mean(column, axis=0)) for column in zip(*map(_last_losses, rows), strict=True)]
        lines.append(f"{'mean':>8}{_cells(means)}")
    return "\n".join(lines)


def draw_seeds(pairs: dict[str, list[Pair]]) -> Figure:
    """For each model the difference of the two backwards: of every seed, and their mean."""
    figure = Figure(figsize=(6.6 * len(pairs), 4.4), layout="constrained")
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axis, rows in zip(axes, pairs.values(), strict=True):
        _draw_model(axis, rows)
    axes[0].set_ylabel("difference (nats)", fontsize=9)
    caption = "Lines: training loss, averaged over a twentieth of the run. Points and crosses: held-out text. "
    figure.supxlabel(f"{caption}Band: \u00b1{TOLERANCE} nats.", x=0.01, ha="left", fontsize=8, color=_APART)
    return figure


def _draw_model(axis: Axes, rows: Sequence[Pair]) -> None:
    of_seeds = [row.eight_bit.training_difference.smoothed() for row in rows]
    apart = _apart(rows)
    of_all = mean([row.eight_bit.training_difference for row in rows]).smoothed()
    held_out = mean([row.eight_bit.held_out_difference for row in rows])
    axis.axhspan(-TOLERANCE, TOLERANCE, color="#e9eef4", zorder=0)
    for number, (line, points) in enumerate(zip(of_seeds, apart, strict=True)):
        labels = [None, None] if number else ["8-bit - bf16 backward, a seed", "bf16 backward, a seed - all seeds"]
        axis.plot(line.steps_N, line.values_N, color=_SEED, linewidth=1, label=labels[0])
        axis.plot(points.steps_N, points.values_N, "x", color=_APART, markersize=5, label=labels[1])
    label = f"8-bit - bf16 backward, mean of {len(rows)} seeds"
    axis.plot(of_all.steps_N, of_all.values_N, color=_MEAN, linewidth=2, label=label)
    axis.plot(held_out.steps_N, held_out.values_N, "o", color=_MEAN, markersize=5)
    last_step = max(row.base.last_step for row in rows)
    shown = [line.after(last_step / 10).values_N for line in (*of_seeds, *apart)]
    limit = 1.1 * max(2 * TOLERANCE, *(np.abs(values).max() for values in shown if len(values)))
    axis.set_ylim(-limit, limit)
    finish_axis(axis, last_step)
    axis.set_title(model_title(rows[0].base.curve), loc="left", fontsize=11, fontweight="bold")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.set_xlabel("step", fontsize=9)


def _apart(rows: Sequence[Pair]) -> list[Line]:
    """How far each seed's held-out loss with the bf16 backward is from their mean."""
    middle = mean([row.base.held_out for row in rows])
    return [row.base.held_out.minus(middle) for row in rows]


def _last_losses(row: Pair) -> list[tuple[float, float]]:
    """The base's loss and the difference, over the last steps and on held-out text at the end; NaN where unknown."""
    held_out, difference = row.base.held_out.values_N, row.eight_bit.held_out_difference.values_N
    at_end = (held_out[-1], difference[-1]) if len(held_out) and len(difference) else (np.nan, np.nan)
    return [(row.base.last_loss, row.eight_bit.last_difference), at_end]


def _cells(losses: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{f'{loss:.4f} ({difference:+.4f})':>26}" for loss, difference in losses)
