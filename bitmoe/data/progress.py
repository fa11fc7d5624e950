"""Progress of tokenization: a live line on a terminal, else one line per 10 seconds."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live

INTERVAL_S = 10.0


class PrepareProgress:
    """Shows documents, tokens and text so far; a context manager.

    Args:
        name: what is being tokenized.
        console: where to show it; by default standard error.
    """

    def __init__(self, name: str, console: Console | None = None):
        self._name = name
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, transient=True) if self._console.is_terminal else None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> "PrepareProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, documents: int, tokens: int, text_bytes: int) -> None:
        """Tell the totals so far."""
        now = time.monotonic()
        speed = tokens / max(now - self._start, 1e-3)
        line = (
            f"preparing {self._name}: {documents:,} documents, {text_bytes / 2**20:,.1f} MiB, "
            f"{tokens:,} tokens, {speed:,.0f} tokens/s"
        )
        if self._live:
            self._live.update(line)
        elif now - self._last >= INTERVAL_S:
            self._last = now
            self._console.print(line, soft_wrap=True, highlight=False)
