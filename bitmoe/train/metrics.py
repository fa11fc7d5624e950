"""What a run records: ``metrics.jsonl``, TensorBoard events and ``log.txt``.

``metrics.jsonl`` is the record of the run: one JSON object a line, each valid by itself, numbers with enough
digits to be read back exactly. TensorBoard shows the same numbers. Nothing here may stop training: a full
disk or a failing TensorBoard gives one warning, and the run goes on. Only rank 0 makes these objects.
"""

import itertools
import json
import math
import os
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from bitmoe.config.errors import InputError
from bitmoe.train.run_dir import RunDir, replace_file

# JSON has no such numbers; Python's and JavaScript's number parsers both read these names.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends metrics to ``metrics.jsonl`` and TensorBoard.

    Args:
        run_dir: the run; its directory exists.
        tensorboard: write TensorBoard events too.
        warn: called with one sentence, at most once for each of the two, when writing fails.
    """

    def __init__(self, run_dir: RunDir, tensorboard: bool = True, warn: Callable[[str], None] = warnings.warn):
        self._run_dir = run_dir
        self._warn = warn
        self._warned = False
        self._file: int | None = None
        self._use_tensorboard = tensorboard
        self._tensorboard = None

    def write(self, record: dict[str, Any]) -> None:
        """Append a record: ``step`` and numbers, 0-d tensors, strings, None or lists of them."""
        record = _plain(record)
        try:
            self._append((json.dumps(record, allow_nan=False) + "\n").encode())
        except OSError as error:
            if not self._warned:
                self._warn(f"{self._run_dir.metrics_file} cannot be written ({error}); training goes on without it")
                self._warned = True
        if self._use_tensorboard:
            try:
                self._write_tensorboard(record)
            except Exception as error:
                self._tensorboard_failed(error)

    def begin(self, step: int) -> None:
        """Prepare for records after ``step``: drop later ones, or set a whole former record aside if step is 0."""
        path = self._run_dir.metrics_file
        if step > 0:
            self.truncate_after(step)
        elif path.exists() and path.stat().st_size:
            aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"metrics.{n}.jsonl")).exists())
            self._close_file()
            path.rename(aside)
            self._warn(f"there was a record but no checkpoint of this run; the record is now {aside.name}")

    def truncate_after(self, step: int) -> None:
        """Drop the records of later steps than ``step``: the run resumes there and will write them again."""
        self._close_file()
        path = self._run_dir.metrics_file
        if not path.exists():
            return
        kept = [record for record in read_metrics(path) if record.get("step", 0) <= step]
        replace_file(path, "".join(json.dumps(_plain(record)) + "\n" for record in kept).encode())

    def close(self) -> None:
        """Flush and close everything."""
        self._close_file()
        if self._tensorboard is not None:
            try:
                self._tensorboard.close()
            except Exception as error:
                self._tensorboard_failed(error)
            self._tensorboard = None

    def _tensorboard_failed(self, error: Exception) -> None:
        if self._use_tensorboard:
            self._warn(f"TensorBoard failed ({error}); its events stop here, metrics.jsonl goes on")
        self._use_tensorboard = False

    def _append(self, line: bytes) -> None:
        if self._file is None:
            self._file = os.open(self._run_dir.metrics_file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            # A line torn by a kill would spoil the next one.
            os.ftruncate(self._file, _whole_lines(self._run_dir.metrics_file.read_bytes()))
        size = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write_tensorboard(self, record: dict[str, Any]) -> None:
        if self._tensorboard is None:
            # Imported here: it takes seconds, and reading metrics needs none of it.
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted run wrote for the steps that are run again.
            self._tensorboard = SummaryWriter(str(self._run_dir.tensorboard), purge_step=record["step"])
        for key, value in record.items():
            if key not in ("step", "tokens") and isinstance(value, int | float | str):
                number = _NON_FINITE.get(value) if isinstance(value, str) else value
                if number is not None:
                    self._tensorboard.add_scalar(_tag(key), number, record["step"])


class TextLog:
    """``log.txt``: what the console says, as plain lines with the time. A failing disk never stops training.

    Args:
        path: the file; new lines are appended.
    """

    def __init__(self, path: Path):
        self._path = path

    def write(self, text: str) -> None:
        """Append text, each of its lines after the local time."""
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        try:
            with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{now}  {line}\n" for line in text.split("\n"))
        except OSError as error:
            warnings.warn(f"{self._path} cannot be written ({error})", stacklevel=2)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a ``metrics.jsonl``, in the order written; NaN and infinities are numbers again.

    A last line that is torn, because the run was killed or is writing it, is left out.

    Raises:
        InputError: there is no such file, or another line than the last is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"no metrics at {path} ({error.strerror})", fix="name the directory of a run") from error
    records = []
    for number, line in enumerate(content[: _whole_lines(content)].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number} is no JSON object", fix="remove that line")
        records.append(_numeric(record))
    return records


def _whole_lines(content: bytes) -> int:
    """Length of what ends with the last newline."""
    return content.rfind(b"\n") + 1


def _plain(value: Any) -> Any:
    """Tensors and numpy scalars as Python numbers, non-finite numbers as their names."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _numeric(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numeric(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numeric(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _tag(key: str) -> str:
    """TensorBoard groups scalars by what stands before the slash."""
    if "/" in key:
        return key
    return f"eval/{key}" if key.startswith(("val_", "bigram_")) else f"train/{key}"
