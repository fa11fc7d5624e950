"""The console: one line per ten seconds, never silent longer, phases, a real terminal, the closing report.

Time is a clock the tests move. Only entering a console starts its thread; most tests do not, so that nothing
but the test itself moves on.
"""

import io
import os
import pty
import threading
from contextlib import suppress

import pytest

from bitmoe.train.closing_report import ClosingReport
from bitmoe.train.console import RunConsole, SilentConsole
from bitmoe.train.metrics import TextLog


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """A pipe that says when something arrived."""

    def __init__(self):
        super().__init__()
        self.arrived = threading.Event()

    def flush(self):
        super().flush()
        self.arrived.set()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stream():
    return Stream()


def test_step_prints_a_line_each_ten_seconds(clock, stream):
    console = RunConsole(300, stream=stream, clock=clock)
    for step in range(1, 121):
        clock.now += 1.0
        console.step(step, loss=2.4126, tokens_per_s=1234.4)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/300" for step in range(1, 121, 10)]
    assert lines[0] == "step 1/300  loss 2.413  1,234 tokens/s  ETA -:--:--"
    assert lines[-1] == "step 111/300  loss 2.413  1,234 tokens/s  ETA 0:03:09"


def test_step_keeps_what_is_not_given(clock, stream):
    console = RunConsole(10, stream=stream, clock=clock)
    console.step(1, loss=1.0, tokens_per_s=50.0, stage="a8")
    clock.now += 10
    console.step(2)
    assert stream.getvalue().splitlines()[1] == "step 2/10  loss 1.000  50 tokens/s  ETA 0:01:20  a8"


def test_eta_of_a_resumed_run_counts_its_own_steps(clock, stream):
    console = RunConsole(200, start_step=100, stream=stream, clock=clock)
    console.step(101)
    clock.now += 20
    console.step(102)
    assert stream.getvalue().splitlines()[1] == "step 102/200  ETA 0:32:40"


def test_tick_speaks_after_ten_silent_seconds_and_not_before(clock, stream):
    console = RunConsole(10, stream=stream, clock=clock)
    with console.phase("evaluation"):
        assert stream.getvalue() == "evaluation ... 0:00:00\n"
        for _ in range(4):
            clock.now += 4.9
            console.tick()
    assert stream.getvalue().splitlines()[1:] == ["evaluation ... 0:00:15"]


def test_tick_in_a_long_step(clock, stream):
    console = RunConsole(10, stream=stream, clock=clock)
    with console.phase("training"):
        clock.now += 10
        console.step(1, loss=1.0)
        clock.now += 12
        console.tick()
    assert stream.getvalue().splitlines()[-1] == "training ... 0:00:12 (step 1/10 done)"


def test_tick_says_the_newest_unsaid_step(clock, stream):
    console = RunConsole(10, stream=stream, clock=clock)
    console.step(1, loss=1.0)
    clock.now += 9
    console.step(2, loss=0.5)
    assert len(stream.getvalue().splitlines()) == 1
    clock.now += 1
    console.tick()
    assert stream.getvalue().splitlines()[1].startswith("step 2/10  loss 0.500")


def test_the_thread_ticks(clock, stream):
    with RunConsole(10, stream=stream, clock=clock) as console, console.phase("data"):
        stream.arrived.clear()
        clock.now += 10
        assert stream.arrived.wait(timeout=60)
        assert stream.getvalue().splitlines()[-1] == "data ... 0:00:10"
    assert "console" not in {thread.name for thread in threading.enumerate()}


def test_say_and_warn_are_never_held_back(clock, stream):
    console = RunConsole(10, stream=stream, clock=clock)
    console.step(1)
    console.say("validation loss 2.0 [bold]")
    console.warn("disk")
    assert stream.getvalue().splitlines()[1:] == ["validation loss 2.0 [bold]", "warning: disk"]


@pytest.mark.parametrize("kind", [SilentConsole, RunConsole])
def test_phases_add_up(kind, clock, stream):
    console = kind(clock=clock) if kind is SilentConsole else kind(10, stream=stream, clock=clock)
    with console.phase("training"):
        clock.now += 5
        with console.phase("evaluation"):
            clock.now += 2
        clock.now += 1
    clock.now += 100
    with suppress(KeyError), console.phase("evaluation"):
        clock.now += 4
        raise KeyError
    assert console.phases == {"training": 6, "evaluation": 6}


def test_silent_console_has_every_public_method_and_prints_nothing(capfd, tmp_path):
    public = {name for name in dir(RunConsole) if not name.startswith("_")}
    assert public - {name for name in dir(SilentConsole) if not name.startswith("_")} == {"tick"}
    with SilentConsole() as console, console.phase("training"):
        console.step(1, loss=1.0)
        console.say("a")
        console.warn("b")
        console.report(ClosingReport(run_dir=tmp_path, steps=1))
    assert capfd.readouterr() == ("", "")


def test_log_gets_what_the_screen_gets(clock, stream, tmp_path):
    console = RunConsole(10, log=TextLog(tmp_path / "log.txt"), stream=stream, clock=clock)
    console.step(1, loss=1.0)
    console.warn("hot")
    logged = [line.split("  ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert logged == stream.getvalue().splitlines() == ["step 1/10  loss 1.000  ETA -:--:--", "warning: hot"]


def test_force_color_does_not_make_a_log_file_a_terminal(clock, stream, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunConsole(10, stream=stream, clock=clock) as console:
        console.step(1, loss=1.0)
    assert stream.getvalue() == "step 1/10  loss 1.000  ETA -:--:--\n"


def test_a_closed_pipe_does_not_stop_training(clock, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    log = TextLog(tmp_path / "log.txt")
    console = RunConsole(10, log=log, stream=os.fdopen(writer, "w", buffering=1), clock=clock)
    console.say("first")
    console.say("second")
    assert (tmp_path / "log.txt").read_text().count("\n") == 2


def test_an_ascii_stream_takes_any_text(clock):
    raw = io.BytesIO()
    console = RunConsole(10, stream=io.TextIOWrapper(raw, encoding="ascii"), clock=clock)
    console.say("caf\u00e9")
    assert raw.getvalue() == b"caf\\xe9\n"


class Terminal:
    """A pseudo-terminal whose other end is read all the time, so that writing to it never blocks."""

    def __init__(self):
        self._ours, theirs = pty.openpty()
        self.stream = os.fdopen(theirs, "w")
        self._shown = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        # Reading fails with EIO once the writing end is closed and everything was read.
        with suppress(OSError):
            while chunk := os.read(self._ours, 4096):
                self._shown += chunk

    def shown(self) -> str:
        """Close it and return all that was written."""
        self.stream.close()
        self._reader.join()
        os.close(self._ours)
        return self._shown.decode()


def test_terminal_shows_live_progress_and_logs_plain_lines(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    log = TextLog(tmp_path / "log.txt")
    with RunConsole(3, log=log, stream=terminal.stream, clock=clock) as console, console.phase("training"):
        for step in (1, 2, 3):
            clock.now += 2
            console.step(step, loss=2.5, tokens_per_s=1000, stage="a48")
        console.say("validation loss 2.0")
    shown = terminal.shown()
    for part in (
        "3/3",
        "loss 2.500  1,000 tokens/s  ETA 0:00:00  a48",
        "validation loss 2.0\r\n",
        "training",
    ):
        assert part in shown
    assert "training ..." not in shown
    logged = (tmp_path / "log.txt").read_text()
    assert "training ... 0:00:00" in logged
    assert "validation loss 2.0" in logged
    assert "\x1b" not in logged


def test_report_closes_the_display_and_prints(clock, stream, tmp_path):
    with RunConsole(10, stream=stream, clock=clock) as console:
        with console.phase("setup"):
            clock.now += 3
        console.report(ClosingReport(run_dir=tmp_path, steps=10, val_loss=1.5, bigram_entropy=2.0))
    assert "1.500 nats/token; bigram entropy of the same text 2.000: beaten by 0.500" in stream.getvalue()
    assert "setup 3.0 s" in stream.getvalue()
