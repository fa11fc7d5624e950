"""The results in words and numbers: a table for people, a line of JSON a run for the record."""

import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from curve_runs import BASE, EIGHT_BIT, SECOND_SEED
from curves import LAST_STEPS, TOLERANCE, Comparison, Line, comparisons, model_title, parameter_counts
from pack import Curve

from bitmoe.train.run_dir import replace_file

POINTS = 100
_ESSENTIALS = (
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads",
    "moe.num_experts", "moe.router_topk", "moe.ffn_hidden_size", "quant.weights", "quant.groups", "quant.backward",
    "quant.stages", "context.seq_length", "data.source", "tokenizer.kind", "optim.lr", "optim.lr_second",
    "optim.lr_end", "optim.warmup_steps", "run.steps", "run.global_batch_size", "run.seed", "run.precision",
)  # fmt: skip


def table(curves: list[Curve]) -> str:
    """Losses of all runs, and differences to the a4.8 run with the bf16 backward."""
    found = comparisons(curves)
    return "\n".join(line for rows in found.values() for line in _model_table(rows)) or "no run has a loss yet"


def _model_table(rows: list[Comparison]) -> list[str]:
    first = rows[0].curve
    steps = first.config["run"]["steps"]
    lines = ["", f"{model_title(first)}; nats per token, in brackets the difference to a4.8 with the bf16 backward"]
    lines.append(f"{'':36}{f'last {min(LAST_STEPS, steps)} steps':>20}{'held-out':>20}{'largest difference':>20}")
    for row in rows:
        held_out, difference = _last(row.held_out), _last(row.held_out_difference)
        cells = [_loss(row.last_loss, row.last_difference), _loss(held_out, difference)]
        largest = "" if row.largest_difference is None else f"{row.largest_difference:.4f}"
        note = "" if row.last_step >= steps else f"  to step {row.last_step} of {steps}"
        lines.append(f"{row.label:36}{cells[0]:>20}{cells[1]:>20}{largest:>20}{note}")
    return [*lines, *_verdict(rows)]


def _verdict(rows: list[Comparison]) -> list[str]:
    """Whether the two backwards train alike."""
    found = {row.curve.variant: row for row in rows if row.largest_difference is not None}
    if EIGHT_BIT not in found:
        return []
    ours = _distances(found[EIGHT_BIT])
    verdict = f"{'within' if max(ours) <= TOLERANCE else 'MORE than'} {TOLERANCE}"
    text = f"the two backwards: {_distance_text(ours)}: {verdict}"
    return [text, *([f"two seeds: {_distance_text(_distances(found[SECOND_SEED]))}"] if SECOND_SEED in found else [])]


def _distances(row: Comparison) -> list[float]:
    """How far a run is from the one it is compared with: smoothed curves at most, and held-out losses at the end."""
    held_out = _last(row.held_out_difference)
    return [row.largest_difference, *([] if held_out is None else [abs(held_out)])]


def _distance_text(distances: list[float]) -> str:
    texts = ("{:.4f} nats apart at most (smoothed, from a tenth of the run on)", "{:.4f} on held-out text at the end")
    return ", ".join(text.format(distance) for text, distance in zip(texts, distances, strict=False))


def write_summaries(path: Path, *records: list[Curve]) -> None:
    """One line of JSON for each run that has a loss, compared with one of its own record."""
    rows = [row for curves in records for model in comparisons(curves).values() for row in model]
    replace_file(path, "".join(json.dumps(_summary(row)) + "\n" for row in rows).encode())


def _summary(row: Comparison) -> dict[str, Any]:
    curve = row.curve
    total, active = parameter_counts(curve)
    return {
        "run": f"{curve.model}-{curve.variant}",
        "what": row.label,
        "is_finished": curve.is_finished,
        "steps": row.last_step,
        "tokens": next(record["tokens"] for record in reversed(curve.records) if "lm_loss" in record),
        "parameters": total,
        "active_parameters": active,
        **(curve.machine or {}),
        "wall_s": curve.wall_s,
        "peak_bytes": max(record.get("peak_bytes", 0) for record in curve.records),
        "config": {key: _at(curve.config, key) for key in _ESSENTIALS},
        "compared_with": f"{curve.model}-{BASE}",
        f"loss_last_{LAST_STEPS}_steps": _rounded(row.last_loss),
        "difference": _rounded(row.last_difference),
        "largest_smoothed_difference": _rounded(row.largest_difference),
        "held_out": _points(row.held_out),
        "held_out_difference": _points(row.held_out_difference),
        "smoothed": _points(row.training.smoothed().every(POINTS)),
    }


def _points(line: Line) -> list[list[float]]:
    return [[int(step), _rounded(value)] for step, value in zip(line.steps_N, line.values_N, strict=True)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)


def _at(tree: Mapping[str, Any], key: str) -> Any:
    return reduce(lambda node, name: node[name], key.split("."), tree)


def _last(line: Line) -> float | None:
    return float(line.values_N[-1]) if len(line) else None


def _loss(value: float | None, difference: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (" " * 10 if difference is None else f" ({difference:+.4f})")
