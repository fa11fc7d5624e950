"""A conversion is never silent for long."""

import io
import time

import pytest
from rich.console import Console

from bitmoe.convert.progress import ConvertProgress


def test_lines_come_while_nothing_is_told():
    shown = io.StringIO()
    progress = ConvertProgress(Console(file=shown, force_terminal=False), interval_s=0.01)
    with progress.phase("writing", 3) as tell:
        tell("model.norm.weight")
        deadline = time.monotonic() + 10
        while shown.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = shown.getvalue().splitlines()
    assert len(lines) >= 3
    assert set(lines) <= {f"writing 1/3 model.norm.weight ({seconds} s)" for seconds in range(11)}


def test_a_terminal_shows_one_live_line():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    with ConvertProgress(console).phase("reading") as tell:
        tell("layers[0]")
        time.sleep(0.5)
    assert "reading" in shown.getvalue()
    assert "layers[0]" in shown.getvalue()


def test_a_failure_ends_the_thread():
    shown = io.StringIO()
    progress = ConvertProgress(Console(file=shown, force_terminal=False), interval_s=0.01)
    with pytest.raises(ZeroDivisionError), progress.phase("writing"):
        raise ZeroDivisionError
    written = shown.getvalue()
    time.sleep(0.05)
    assert shown.getvalue() == written
