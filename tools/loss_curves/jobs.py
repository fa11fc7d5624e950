"""Trainings as processes: so many at once, each on its GPU, watched until all have ended.

What a run prints goes to ``<folder>/<run>.log``. ``curve.json`` in its directory says with what overrides it was made,
on what machine, and, once it has ended well, how long it took: then it need not be made again.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from curve_runs import CurveRun

from bitmoe.config.errors import InputError
from bitmoe.train.launcher import count_gpus
from bitmoe.train.metrics import read_metrics
from bitmoe.train.run_dir import RunDir, replace_file

POLL_S, INTERVAL_S = 0.1, 15.0
TAIL_LINES = 40
_MARK = "curve.json"


@dataclass
class _Job:
    run: CurveRun
    process: subprocess.Popen
    since: float = field(default_factory=time.monotonic)


class Trainings:
    """Runs trainings.

    Args:
        folder: of the runs; exists.
        jobs: how many at once.
        gpus: as CUDA_VISIBLE_DEVICES names them, taken in turn; empty leaves the environment as it is.
        commit: recorded where git knows none.
    """

    def __init__(self, folder: Path, jobs: int, gpus: Sequence[str], commit: str | None = None):
        self._folder, self._jobs, self._gpus = folder, jobs, gpus
        self._machine = _machine(commit)
        self._running: dict[int, _Job] = {}
        self._failed: list[str] = []

    def command(self, run: CurveRun) -> list[str]:
        """The process of a run."""
        place = [f"run.dir={self._folder}", f"run.name={run.name}"]
        return [sys.executable, "-m", "bitmoe", "pretrain", *run.overrides, *place]

    def run(self, runs: Sequence[CurveRun], on_news: Callable[[], None]) -> list[str]:
        """Train what has not finished before.

        Args:
            runs: in the order to start them.
            on_news: called now and then, and when a run has ended.

        Returns:
            Names of the runs that failed.

        Raises:
            InputError: a run was begun before with other overrides.
        """
        waiting = [run for run in runs if not self._has_finished(run)]
        for run in runs:
            if run not in waiting:
                print(f"{run.name}: finished before, not run again", flush=True)
        said = time.monotonic()
        try:
            while waiting or self._running:
                for slot in range(self._jobs):
                    if waiting and slot not in self._running:
                        self._running[slot] = self._start(waiting.pop(0), slot)
                time.sleep(POLL_S)
                has_news = self._collect_ended()
                if time.monotonic() - said >= INTERVAL_S:
                    print("\n".join(self._progress(job) for job in self._running.values()), flush=True)
                    said, has_news = time.monotonic(), True
                if has_news:
                    on_news()
        finally:
            self._stop()
            on_news()
        return self._failed

    def _has_finished(self, run: CurveRun) -> bool:
        directory = self._folder / run.name
        mark = read_mark(directory)
        if mark and mark["overrides"] != list(run.overrides):
            before, now = " ".join(mark["overrides"]), " ".join(run.overrides)
            raise InputError(
                f"{directory} was begun with {before}, and now it would be {now}",
                fix="give another --out, or delete that run",
            )
        return bool(mark and mark["wall_s"] is not None)

    def _start(self, run: CurveRun, slot: int) -> _Job:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // self._jobs)), **os.environ}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        self._mark(run)
        with _log(self._folder, run.name).open("w") as log:
            process = subprocess.Popen(self.command(run), env=environment, stdout=log, stderr=subprocess.STDOUT)
        print(f"{run.name}: started", flush=True)
        return _Job(run, process)

    def _collect_ended(self) -> bool:
        """Deal with runs that have ended; whether there were any."""
        ended = {slot: job for slot, job in self._running.items() if job.process.poll() is not None}
        for slot, job in ended.items():
            del self._running[slot]
            if job.process.returncode:
                self._report_failure(job)
            else:
                self._finish(job)
        return bool(ended)

    def _finish(self, job: _Job) -> None:
        seconds = round(time.monotonic() - job.since, 1)
        self._mark(job.run, seconds)
        # They are nobody's start, and those of all runs would fill a disk.
        shutil.rmtree(RunDir(self._folder / job.run.name).checkpoints, ignore_errors=True)
        print(f"{self._progress(job)}: done in {seconds:.0f} s", flush=True)

    def _mark(self, run: CurveRun, seconds: float | None = None) -> None:
        directory = self._folder / run.name
        directory.mkdir(parents=True, exist_ok=True)
        mark = {"overrides": run.overrides, "machine": self._machine, "wall_s": seconds}
        replace_file(directory / _MARK, json.dumps(mark).encode())

    def _report_failure(self, job: _Job) -> None:
        name, status = job.run.name, job.process.returncode
        self._failed.append(name)
        print(f"{self._progress(job)}: FAILED with status {status}; the end of {_log(self._folder, name)}:")
        print("\n".join(f"    {line}" for line in log_tail(self._folder, name)), flush=True)

    def _progress(self, job: _Job) -> str:
        """One line: where a run is."""
        records = losses(self._folder / job.run.name)
        if not records:
            return f"{job.run.name:16} no step yet"
        last = records[-1]
        tokens_per_s = statistics.median(record["tokens_per_s"] for record in records[-20:])
        return f"{job.run.name:16} step {last['step']:5}  loss {last['lm_loss']:.3f}  {tokens_per_s:,.0f} tokens/s"

    def _stop(self) -> None:
        """Let runs that still go on save and end."""
        for job in self._running.values():
            job.process.terminate()
        for job in self._running.values():
            job.process.wait()
        self._running.clear()


def read_mark(run_dir: Path) -> dict | None:
    """``overrides``, ``machine`` and ``wall_s`` (None until it ended well) of a run; None if it never began."""
    mark = run_dir / _MARK
    return json.loads(mark.read_text()) if mark.exists() else None


def losses(run_dir: Path) -> list[dict]:
    """The records of a run's steps so far."""
    try:
        return [record for record in read_metrics(RunDir(run_dir).metrics_file) if "lm_loss" in record]
    except InputError:
        return []


def log_tail(folder: Path, name: str) -> list[str]:
    """The last lines that a run printed."""
    try:
        return _log(folder, name).read_text(errors="replace").splitlines()[-TAIL_LINES:]
    except FileNotFoundError:
        return []


def visible_gpus() -> list[str]:
    """The GPUs to take in turn, as CUDA_VISIBLE_DEVICES names them; empty where there are not several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = [str(index) for index in range(count_gpus(os.environ))]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    return names if len(names) > 1 else []


def _log(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _machine(commit: str | None) -> dict[str, str | None]:
    """What figures depend on: the GPU, versions, the commit."""
    # Not by torch: that would keep some hundred MiB of the GPU for as long as this process lives.
    gpu = _first_line(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    machine = {"gpu": gpu or "no GPU"}
    for package in ("torch", "triton", "megatron-core"):
        with suppress(PackageNotFoundError):
            machine[package] = version(package)
    described = _first_line(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])
    return {**machine, "commit": described or commit}


def _first_line(command: list[str]) -> str | None:
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip().partition("\n")[0]
    return None
