"""The record of all runs in one file: JSON lines, one a run, small enough to carry from one machine to another."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curve_runs import CurveRun
from jobs import log_tail, read_mark

from bitmoe.config.errors import InputError
from bitmoe.train.metrics import read_metrics
from bitmoe.train.run_dir import RunDir, replace_file

PACK_NAME = "curves.jsonl"
_KEPT = ("step", "tokens", "lm_loss", "val_loss", "grad_norm", "lr", "stage", "tokens_per_s", "peak_bytes")


@dataclass
class Curve:
    """What is kept of a run."""

    model: str
    """A key of MODELS."""
    variant: str
    """A key of VARIANTS."""
    overrides: list[str]
    is_finished: bool
    wall_s: float | None
    """How long its process took; None while it is not finished."""
    machine: dict[str, str | None] | None
    """GPU, versions and commit; None if it never began."""
    config: dict[str, Any] | None
    """Its config.yaml; None if it never began."""
    records: list[dict[str, Any]]
    """Of its metrics.jsonl, some keys."""
    log: list[str]
    """The last lines it printed."""


def write_pack(path: Path, folder: Path, runs: Sequence[CurveRun]) -> None:
    """Write what there is of all runs so far, replacing an older record as a whole."""
    lines = "".join(json.dumps(asdict(_curve(folder, run))) + "\n" for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lines.encode())


def read_pack(path: Path) -> list[Curve]:
    """What ``write_pack`` wrote.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    try:
        return [Curve(**json.loads(line)) for line in path.read_text().splitlines()]
    except OSError as error:
        fix = "give the folder that loss_curves run --out wrote, or its --pack file"
        raise InputError(f"there is no record of runs at {path} ({error.strerror})", fix=fix) from error
    except (ValueError, TypeError) as error:
        what = f"{path} is no record of loss_curves runs ({error})"
        raise InputError(what, fix="write it again: loss_curves run") from error


def _curve(folder: Path, run: CurveRun) -> Curve:
    directory = RunDir(folder / run.name)
    mark = read_mark(directory.path) or {"wall_s": None, "machine": None}
    return Curve(
        model=run.model,
        variant=run.variant,
        overrides=list(run.overrides),
        is_finished=mark["wall_s"] is not None,
        wall_s=mark["wall_s"],
        machine=mark["machine"],
        config=directory.load_config(),
        records=_records(directory.metrics_file),
        log=log_tail(folder, run.name),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [{key: record[key] for key in _KEPT if key in record} for record in read_metrics(path)]
