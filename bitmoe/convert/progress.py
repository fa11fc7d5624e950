"""What a conversion shows while it works: a live line on a terminal, else a line every ten seconds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.markup import escape

INTERVAL_S = 10.0
_LIVE_INTERVAL_S = 0.2


class ConvertProgress:
    """Shows phases of a conversion on standard error.

    Args:
        console: where; by default standard error.
        interval_s: seconds between lines where the console is no terminal.
    """

    def __init__(self, console: Console | None = None, interval_s: float = INTERVAL_S):
        self._console, self._interval_s = console or Console(stderr=True), interval_s

    @contextmanager
    def phase(self, title: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
        """Show that something goes on; yields what is told the name of each tensor that is done.

        Args:
            title: what goes on.
            total: how many tensors there will be.
        """
        start, names = time.monotonic(), []

        def line() -> str:
            count = f" {len(names)}/{total} {names[-1]}" if names else ""
            return f"{title}{count} ({time.monotonic() - start:.0f} s)"

        with ExitStack() as stack:
            interval_s, show = self._interval_s, self._print
            if self._console.is_terminal:
                status = stack.enter_context(self._console.status(title))
                interval_s, show = _LIVE_INTERVAL_S, lambda text: status.update(escape(text))
            stack.enter_context(_repeated(lambda: show(line()), interval_s))
            yield names.append

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _repeated(call: Callable[[], None], interval_s: float) -> Iterator[None]:
    """Call a function again and again, from a thread, until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(interval_s):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
