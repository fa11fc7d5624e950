"""``loss.png``: the curves of a run in one picture, made from ``metrics.jsonl`` without any server.

On top the loss: training (every logged step and smoothed), held-out, and the bigram entropy of the held-out
text. Below one small panel for each thing that was recorded: learning rate, gradient norm, zeros by linear
role in inputs and in ternary weights, expert load, router entropy. Dotted lines mark where the bit stage and
the learning-rate stage change. Works on a run that is still being written.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from bitmoe.config.choices import ActFormat, Schedule
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, OptimConfig
from bitmoe.quant.bit_schedule import stage_name
from bitmoe.train.metrics import read_metrics
from bitmoe.train.run_dir import RunDir, replace_file
from bitmoe.train.schedule import switch_step

_BLUE, _ORANGE, _GRAY, _INK = "#1f6fb4", "#d9541e", "#8a8a8a", "#222222"
_CYCLE = ("#1f6fb4", "#d9541e", "#2a9d5c", "#8a4fbf", "#b58900", "#555555")
_STYLE = {"fontsize": 9, "color": _INK}


@dataclass(frozen=True)
class _Panel:
    """A small panel: all keys that equal ``key``, or begin with it if it ends in a slash."""

    title: str
    key: str
    percent: bool = False
    log: bool = False
    bounds: tuple[float, float] | None = None
    even: float | None = None


_PANELS = (
    _Panel("learning rate", "lr"),
    _Panel("gradient norm", "grad_norm", log=True),
    _Panel("zeros in quantized inputs", "sparsity/", percent=True, bounds=(0, 1)),
    _Panel("zeros in ternary weights", "zeros/", percent=True),
    _Panel("expert load, maximum / mean", "moe/load_max_over_mean", even=1.0),
    _Panel("router entropy (nats)", "moe/router_entropy"),
)


def plot_run(run_dir: Path) -> Path:
    """Draw the curves of a run.

    Args:
        run_dir: the run's directory, finished or still being written.

    Returns:
        Path of the picture, ``loss.png`` in that directory; an older one is replaced as a whole.

    Raises:
        InputError: no metrics, or none with a loss yet.
    """
    run = RunDir(run_dir)
    records = read_metrics(run.metrics_file)
    if not any(_is_number(record.get("lm_loss")) for record in records):
        raise InputError(f"{run.metrics_file} has no loss yet", fix="wait for the first logged step of the run")
    figure = draw(run.path.resolve().name, records, run.load_config())
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    replace_file(run.plot_file, picture.getvalue())
    return run.plot_file


def draw(name: str, records: list[dict[str, Any]], config: dict[str, Any] | None) -> Figure:
    """The figure of a run.

    Args:
        name: its title.
        records: the run's metrics, at least one with ``lm_loss``.
        config: the run's ``config.yaml``, for the names of bit stages and the learning-rate switch; None
            if unknown.
    """
    # A dict, not a set: roles keep the order in which they were recorded.
    present = {key: None for record in records for key, value in record.items() if _is_number(value)}
    panels = [panel for panel in _PANELS if _keys(panel, present)]
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 4.4 + 1.75 * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06, hspace=0.03, wspace=0.03)
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[2.6] + [1] * rows)
    loss = figure.add_subplot(grid[0, :])
    _draw_loss(loss, records)
    loss.set_title(name, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=18)
    axes = [loss]
    for index, panel in enumerate(panels):
        axes.append(figure.add_subplot(grid[1 + index // 2, index % 2]))
        _draw_panel(axes[-1], panel, records, _keys(panel, present))
    last = max(record["step"] for record in records)
    events = [(step, label) for step, label in _events(records, config) if step <= last]
    for axis in axes:
        finish_axis(axis, last)
        for step, _ in events:
            axis.axvline(step, color=_GRAY, linewidth=1, linestyle=":", zorder=1)
    for axis in axes[-2:] if panels else axes:
        axis.set_xlabel("step", **_STYLE)
    _label_events(loss, events, last)
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of a curve, shorter at its ends.

    Args:
        values: [N]; NaN and infinities are left out.

    Returns:
        [N]; NaN where there is nothing to average.
    """
    half = len(values) // 40
    finite = np.isfinite(values)
    padded = np.pad(np.where(finite, values, 0.0), half)
    counts = np.pad(finite.astype(float), half)
    window = np.ones(2 * half + 1)
    with np.errstate(invalid="ignore"):
        return np.convolve(padded, window, "valid") / np.convolve(counts, window, "valid")


def _draw_loss(axis: Axes, records: list[dict[str, Any]]) -> None:
    steps, values = _series(records, "lm_loss")
    axis.plot(steps, values, color=_BLUE, alpha=0.4, linewidth=0.8)
    axis.plot(steps, smooth(values), color=_BLUE, linewidth=1.8, label="training")
    seen = [values]
    if any(_is_number(record.get("val_loss")) for record in records):
        steps, values = _series(records, "val_loss")
        axis.plot(steps, values, color=_ORANGE, marker="o", markersize=4.5, linewidth=1, label="held-out")
        _note(axis, steps[-1], values[-1], _ORANGE)
        seen.append(values)
    if any(_is_number(record.get("bigram_entropy")) for record in records):
        entropy = _series(records, "bigram_entropy")[1][-1]
        axis.axhline(
            entropy,
            color=_INK,
            linewidth=1.1,
            linestyle="--",
            label=f"bigram entropy of held-out text, {entropy:.3f}",
        )
        seen.append(np.array([entropy]))
    _limit(axis, np.concatenate(seen), first=seen[0][0])
    axis.set_ylabel("loss (nats per token)", **_STYLE)
    axis.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize=9, loc="upper right")


def _limit(axis: Axes, losses: np.ndarray, first: float) -> None:
    """Fit the axis. A healthy run never exceeds its first loss by much: a spike may leave the picture."""
    losses = losses[np.isfinite(losses)]
    if not losses.size:
        return
    low, high = losses.min(), losses.max()
    if low < 1.3 * first < high:
        high = 1.3 * first
    margin = 0.05 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)


def _draw_panel(axis: Axes, panel: _Panel, records: list[dict[str, Any]], keys: list[str]) -> None:
    if panel.even is not None:
        axis.axhline(panel.even, color=_INK, linewidth=1, linestyle="--")
    for key, color in zip(keys, _CYCLE * len(keys), strict=False):
        steps, values = _series(records, key)
        axis.plot(steps, values, color=color, linewidth=1.2, label=key.removeprefix(panel.key))
    _scale(axis, panel, positive=all((_series(records, key)[1] > 0).all() for key in keys))
    if panel.key.endswith("/"):
        axis.legend(
            frameon=False, fontsize=8, ncols=len(keys), loc="lower right", bbox_to_anchor=(1.02, 0.95),
            handlelength=1, handletextpad=0.4, columnspacing=1,
        )  # fmt: skip
    axis.set_title(panel.title, loc="left", **_STYLE)


def _scale(axis: Axes, panel: _Panel, positive: bool) -> None:
    """Scale and label the value axis of a panel; logarithms need positive values."""
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if panel.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if panel.log and positive:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    if panel.bounds is not None:
        axis.set_ylim(*panel.bounds)


def finish_axis(axis: Axes, last: int) -> None:
    """Steps from 0 to ``last`` below, faint lines across, no frame."""
    axis.set_xlim(0, 1.01 * last)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, colors=_INK)


def _events(records: list[dict[str, Any]], config: dict[str, Any] | None) -> list[tuple[int, str]]:
    """Steps where a stage changed and what to call it: bit stages as recorded, the switch as configured."""
    config = config or {}
    events = []
    stages = [(record["step"], record["stage"]) for record in records if "stage" in record]
    for (_, before), (step, stage) in zip(stages, stages[1:], strict=False):
        if stage != before:
            events.append((step, f"bit stage {_stage_label(stage, config)}"))
    optim = config.get("optim", {})
    if optim.get("schedule") == Schedule.two_stage.value:
        switch = switch_step(OptimConfig(switch=optim["switch"]), config["run"]["steps"])
        if switch is not None:
            events.append((switch, "learning-rate switch"))
    return sorted(events)


def _stage_label(stage: Any, config: dict[str, Any]) -> str:
    stages = config.get("quant", {}).get("stages", [])
    if not isinstance(stage, int) or not 0 <= stage < len(stages):
        return str(stage)
    fields = {key: ActFormat(value) if isinstance(value, str) else value for key, value in stages[stage].items()}
    return stage_name(BitStage(**fields))


def _label_events(axis: Axes, events: list[tuple[int, str]], last: int) -> None:
    """Name the dotted lines above the axis; a label that would touch its neighbour goes one line higher."""
    previous, level = None, 0
    for step, label in events:
        level = 1 - level if previous is not None and step - previous < 0.2 * last else 0
        axis.annotate(
            label,
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 11 * level),
            textcoords="offset points",
            ha="right" if step > 0.9 * last else "center",
            fontsize=8.5,
            color="#555555",
        )
        previous = step


def _note(axis: Axes, step: int, value: float, color: str) -> None:
    """Write a curve's last value to the right of it."""
    if np.isfinite(value):
        axis.annotate(
            f"{value:.3f}",
            (step, value),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
        )


def _keys(panel: _Panel, present: dict[str, None]) -> list[str]:
    if panel.key.endswith("/"):
        return [key for key in present if key.startswith(panel.key)]
    return [panel.key] if panel.key in present else []


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and values [N] of the records that hold a number under ``key``."""
    points = [(record["step"], record[key]) for record in records if _is_number(record.get(key))]
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values, dtype=float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
