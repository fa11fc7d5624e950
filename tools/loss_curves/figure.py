"""The figure: for each model its training losses, and below how far each run is from a4.8 with the bf16 backward.

Losses are smoothed, with those of single steps faintly behind. Runs that read the same text in the same order differ
smoothly; the second seed reads another order, which its difference shows, too. On held-out text (points) all are equal.
"""

from collections.abc import Sequence

import numpy as np
from curve_runs import BASE, BF16, EIGHT_BIT, SECOND_SEED
from curves import TOLERANCE, Comparison, Line, comparisons, model_title
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from pack import Curve

from bitmoe.config.choices import Schedule
from bitmoe.config.errors import InputError
from bitmoe.config.schema import OptimConfig
from bitmoe.quant.bit_schedule import first_step
from bitmoe.train.plot import finish_axis
from bitmoe.train.schedule import switch_step

_INK, _GRAY = "#222222", "#777777"
_COLORS = {BF16: "#555555", BASE: "#1f6fb4", EIGHT_BIT: "#d9541e", SECOND_SEED: "#2a9d5c"}
_SHORT = {BF16: "bf16", BASE: "a4.8", EIGHT_BIT: "a4.8, 8-bit backward", SECOND_SEED: "a4.8, second seed"}
_TEXT = {"fontsize": 9, "color": _INK}
# What comes before this share of the run may leave the picture: losses fall by nats there.
_SHOWN_FROM = 0.08
_LABEL_GAP = 0.075


def draw(curves: list[Curve]) -> Figure:
    """The figure of all runs that have a loss.

    Raises:
        InputError: none has.
    """
    found = comparisons(curves)
    if not found:
        raise InputError("no run has a loss yet", fix="wait for the first steps")
    figure = Figure(figsize=(6.6 * len(found), 6.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06, wspace=0.04)
    axes = figure.subplots(2, len(found), sharex="col", squeeze=False, height_ratios=[1.5, 1])
    for column, rows in enumerate(found.values()):
        top, bottom = axes[:, column]
        _draw_losses(top, rows)
        _draw_differences(bottom, rows)
        _mark_stages([top, bottom], rows)
    axes[0, 0].set_ylabel(f"training loss (nats per {_unit(curves)})", **_TEXT)
    axes[1, 0].set_ylabel("difference to a4.8 with bf16 backward", **_TEXT)
    figure.supxlabel(_caption(found), x=0.01, ha="left", fontsize=8, color=_GRAY)
    return figure


def _draw_losses(axis: Axes, rows: Sequence[Comparison]) -> None:
    ends = []
    for row in rows:
        color, smoothed = _COLORS[row.curve.variant], row.training.smoothed()
        axis.plot(row.training.steps_N, row.training.values_N, color=color, alpha=0.13, linewidth=0.6)
        axis.plot(smoothed.steps_N, smoothed.values_N, color=color, linewidth=1.6)
        ends.append((_end(smoothed), f"{_SHORT[row.curve.variant]}  {_end(smoothed):.3f}", color))
    shown = np.concatenate([_shown(row.training.smoothed(), row).values_N for row in rows])
    _finish(axis, rows, shown.min(), shown.max())
    _label_ends(axis, ends)
    axis.set_title(model_title(rows[0].curve), loc="left", fontsize=11, fontweight="bold", color=_INK, pad=18)


def _draw_differences(axis: Axes, rows: Sequence[Comparison]) -> None:
    axis.axhspan(-TOLERANCE, TOLERANCE, color="#e9eef4", zorder=0)
    axis.axhline(0, color=_COLORS[BASE], linewidth=1.6)
    shown, ends = [np.array([-2 * TOLERANCE, 2 * TOLERANCE])], []
    # The second seed is what the others are seen against.
    for row in sorted(rows, key=lambda row: row.curve.variant != SECOND_SEED):
        if not len(row.training_difference):
            continue
        color, line = _COLORS[row.curve.variant], row.training_difference.smoothed()
        is_faint = row.curve.variant == SECOND_SEED
        axis.plot(line.steps_N, line.values_N, color=color, linewidth=1.4, alpha=0.5 if is_faint else 1)
        axis.plot(row.held_out_difference.steps_N, row.held_out_difference.values_N, "o", color=color, markersize=4)
        ends.append((_end(line), f"{_SHORT[row.curve.variant]}  {_end(line):+.3f}", color))
        shown += [_shown(line, row).values_N, _shown(row.held_out_difference, row).values_N]
    largest = np.abs(np.concatenate(shown)).max()
    _finish(axis, rows, -largest, largest)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}" if abs(value) > 1e-9 else "0"))
    _label_ends(axis, [*ends, (0.0, "a4.8", _COLORS[BASE])])
    axis.set_xlabel("step", **_TEXT)


def _finish(axis: Axes, rows: Sequence[Comparison], low: float, high: float) -> None:
    margin = 0.05 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)
    finish_axis(axis, max(row.last_step for row in rows))


def _label_ends(axis: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name curves to the right of their ends, with lines to labels that had to make room for others."""
    low, high = axis.get_ylim()
    heights = [float(np.clip((value - low) / (high - low), 0, 1)) for value, _, _ in ends]
    order = np.argsort(heights, kind="stable")
    places = _apart([heights[i] for i in order], _LABEL_GAP)
    for place, index in zip(places, order, strict=True):
        _, label, color = ends[index]
        path = [(1.0, heights[index]), (1.035, place)]
        axis.plot(*zip(*path, strict=True), transform=axis.transAxes, color=color, linewidth=0.8, clip_on=False)
        axis.text(1.045, place, label, transform=axis.transAxes, va="center", fontsize=8.5, color=color)


def _apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed to lie ``gap`` apart: those that touch spread about their middle."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _spread(groups[-1], gap)[0] - _spread(groups[-2], gap)[-1] < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [place for group in groups for place in _spread(group, gap)]


def _spread(group: list[float], gap: float) -> list[float]:
    first = sum(group) / len(group) - gap * (len(group) - 1) / 2
    return [first + gap * index for index in range(len(group))]


def _mark_stages(axes: Sequence[Axes], rows: Sequence[Comparison]) -> None:
    """Dotted lines where 4-bit inputs begin and where the learning rate changes its curve."""
    config = rows[0].curve.config
    steps, optim = config["run"]["steps"], config["optim"]
    marks = {}
    if optim["schedule"] == Schedule.two_stage.value:
        marks["learning-rate switch"] = switch_step(OptimConfig(switch=optim["switch"]), steps)
    stages = max((row.curve.config["quant"]["stages"] for row in rows), key=len)
    if len(stages) > 1:
        marks["4-bit inputs"] = first_step(stages[1]["start"], steps)
    for label, step in marks.items():
        for axis in axes:
            axis.axvline(step, color=_GRAY, linewidth=0.9, linestyle=":", zorder=1)
        axes[0].annotate(
            label, (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=8, color=_GRAY,
        )  # fmt: skip


def _caption(found: dict[str, list[Comparison]]) -> str:
    curve = next(iter(found.values()))[0].curve
    config = curve.config
    text = config["data"]["source"].replace("stdlib", "Python's standard library")
    a_step = config["run"]["global_batch_size"] * config["context"]["seq_length"]
    where = f", {curve.machine['gpu']}" if curve.machine else ""
    return (
        f"{text}, {a_step:,} tokens a step{where}. Lines: training loss, averaged over a twentieth of the run (faint: "
        f"single steps). Points: held-out text. Band: \u00b1{TOLERANCE} nats."
    )


def _unit(curves: list[Curve]) -> str:
    kinds = {curve.config["tokenizer"]["kind"] for curve in curves if curve.config}
    return "byte" if kinds == {"byte"} else "token"


def _shown(line: Line, row: Comparison) -> Line:
    part = line.after(_SHOWN_FROM * row.last_step)
    return part if len(part) else line


def _end(line: Line) -> float:
    return float(line.values_N[-1])
