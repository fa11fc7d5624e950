"""What rank 0 says while a run goes on.

On a terminal a live line shows phase, step, loss, tokens/s, ETA and bit stage. Elsewhere (a pipe, a batch
system's log) there is one plain line each 10 seconds: never more progress than that, and never a longer
silence, also inside a long step or evaluation. Warnings and results are always printed at once. ``log.txt``
gets the plain lines in both cases. Every other rank holds a ``SilentConsole`` and says nothing.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from bitmoe.train.closing_report import ClosingReport, render_report
from bitmoe.train.metrics import TextLog

INTERVAL_S = 10.0


class SilentConsole:
    """Times phases and says nothing: the console of every rank but 0.

    ``phases`` maps the name of each phase to the seconds spent in it. A phase inside another (an evaluation
    inside the training) counts for itself alone, so the values add up to the time of the run.

    Args:
        clock: seconds from any origin; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.phases: dict[str, float] = {}
        self._clock = clock
        self._open_phases: list[str] = []
        self._phase_since = clock()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside as phase ``name``."""
        self._account()
        self._open_phases.append(name)
        self._phase_changed()
        try:
            yield
        finally:
            self._account()
            self._open_phases.pop()
            self._phase_changed()

    def step(self, step: int, *, loss: float | None = None, tokens_per_s: float | None = None, stage: str = "") -> None:
        """An optimizer step (from 1) has ended. What is None or empty keeps its last value."""

    def say(self, text: str) -> None:
        """Print a result at once."""

    def warn(self, text: str) -> None:
        """Print a warning at once."""

    def report(self, report: ClosingReport) -> None:
        """Print the closing report of the run."""

    def close(self) -> None:
        """Stop the live display. Printing still works."""

    def _account(self) -> None:
        now = self._clock()
        if self._open_phases:
            name = self._open_phases[-1]
            self.phases[name] = self.phases.get(name, 0.0) + now - self._phase_since
        self._phase_since = now

    def _phase_changed(self) -> None:
        """Called when another phase has become the current one."""


class RunConsole(SilentConsole):
    """The console of rank 0. Use it as a context manager.

    Args:
        steps: optimizer steps of the run.
        start_step: steps done before, when the run is resumed.
        log: where the plain lines go too; None for nowhere.
        stream: where to print; None means standard output.
        clock: seconds from any origin; tests give their own.
    """

    def __init__(
        self,
        steps: int,
        *,
        start_step: int = 0,
        log: TextLog | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(clock)
        self._stream = stream or sys.stdout
        if hasattr(self._stream, "reconfigure"):
            # A sample may hold any character; a C locale must not end the run over it.
            self._stream.reconfigure(errors="backslashreplace")
        self._log = log
        self._steps = steps
        self._done = start_step
        self._loss: float | None = None
        self._tokens_per_s: float | None = None
        self._stage = ""
        self._recent: deque[tuple[float, int]] = deque(maxlen=50)
        self._unsaid_step = False
        self._last_line = -float("inf")
        # The ticker prints too; reentrant, because a signal handler of the main thread may print as well.
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._ticker: threading.Thread | None = None
        self._console = _Screen(file=self._stream, highlight=False, markup=False)
        # Not console.is_terminal: FORCE_COLOR, common in build systems, would make that true of a log file.
        self._live = self._stream.isatty() and not self._console.is_dumb_terminal
        self._progress = self._make_progress() if self._live else None

    def __enter__(self):
        if self._progress is not None:
            self._progress.start()
        self._ticker = threading.Thread(target=self._tick_until_closed, name="console", daemon=True)
        self._ticker.start()
        return self

    def step(self, step: int, *, loss: float | None = None, tokens_per_s: float | None = None, stage: str = "") -> None:
        """An optimizer step (from 1) has ended. What is None or empty keeps its last value."""
        with self._lock:
            self._done = step
            self._loss = self._loss if loss is None else loss
            self._tokens_per_s = self._tokens_per_s if tokens_per_s is None else tokens_per_s
            self._stage = stage or self._stage
            self._recent.append((self._clock(), step))
            self._unsaid_step = True
            if self._progress is not None:
                self._progress.update(self._progress.task_ids[0], completed=step, status=self._status())
            self.tick()

    def tick(self) -> None:
        """Say where the run is, if nothing was said for 10 seconds. A thread calls this all the time."""
        with self._lock:
            now = self._clock()
            if now - self._last_line < INTERVAL_S:
                return
            if self._unsaid_step:
                self._progress_line(f"step {self._done}/{self._steps}  {self._status()}")
                return
            # A copy: the main thread may leave the phase meanwhile.
            for name in self._open_phases[-1:]:
                since, after = self._phase_since, ""
                if self._recent:
                    since, after = max(since, self._recent[-1][0]), f" (step {self._done}/{self._steps} done)"
                self._progress_line(f"{name} ... {_hms(now - since)}{after}")

    def say(self, text: str) -> None:
        """Print a result at once."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning at once."""
        self._print(f"warning: {text}", style="yellow")

    def report(self, report: ClosingReport) -> None:
        """Print the closing report of the run."""
        self.close()
        self._print("\n" + render_report(report, self.phases))

    def close(self) -> None:
        """Stop the live display. Printing still works."""
        self._closing.set()
        if self._ticker is not None:
            self._ticker.join()
            self._ticker = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._live = False

    def _phase_changed(self) -> None:
        with self._lock:
            if self._progress is not None:
                name = self._open_phases[-1] if self._open_phases else ""
                self._progress.update(self._progress.task_ids[0], description=name, refresh=True)
            self.tick()

    def _tick_until_closed(self) -> None:
        while not self._closing.wait(0.2):
            self.tick()

    def _progress_line(self, text: str) -> None:
        """A throttled plain line: to the log always, to the screen where there is no live display."""
        self._unsaid_step = False
        self._print(text, to_screen=not self._live)

    def _print(self, text: str, style: str | None = None, to_screen: bool = True) -> None:
        with self._lock:
            self._last_line = self._clock()
            if self._log is not None:
                self._log.write(text)
            if to_screen:
                try:
                    self._console.print(text, style=style, soft_wrap=True)
                    self._stream.flush()
                except OSError:
                    # The terminal went away: not a reason to stop training.
                    self._console.quiet = True

    def _status(self) -> str:
        parts = []
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        if self._tokens_per_s is not None:
            parts.append(f"{self._tokens_per_s:,.0f} tokens/s")
        parts.append(f"ETA {self._eta()}")
        if self._stage:
            parts.append(self._stage)
        return "  ".join(parts)

    def _eta(self) -> str:
        (since, first), (now, last) = self._recent[0], self._recent[-1]
        if last == first:
            return "-:--:--"
        return _hms((self._steps - last) * (now - since) / (last - first))

    def _make_progress(self) -> Progress:
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            console=self._console,
            expand=True,
        )
        progress.add_task("", total=self._steps, completed=self._done, status="")
        return progress


class _Screen(Console):
    """A rich console that, when the reader of its pipe goes away, falls silent and does not exit."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Also what Python flushes at exit must go somewhere, or the exit status becomes 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def _hms(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
