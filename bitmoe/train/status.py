"""``status.json`` in a run directory: how its last start ended, for scripts and restarted workers.

torchrun answers 1 whatever its workers answered, and with ``--max-restarts`` it starts them again even after
an end that was meant: bad input, which a second try does not mend, and a stop by signal after saving. Rank 0
leaves its exit status here; a worker that was restarted and finds one of those two ends with it at once.
"""

import json
import os
from pathlib import Path
from typing import Any

from bitmoe.config.errors import InputError
from bitmoe.train.run_dir import RunDir, replace_file

DONE, BAD_INPUT, STOPPED = 0, 2, 75
"""Exit statuses: all steps done; input that cannot work; stopped by a signal after saving (EX_TEMPFAIL)."""
_NAMES = {DONE: "done", BAD_INPUT: "bad_input", STOPPED: "stopped"}


def write_running(run_dir: Path) -> None:
    """Mark a run as being worked on by this process. Rank 0 calls it once it owns the run directory."""
    _write(run_dir, "running", None, "")


def write_ended(run_dir: Path, exit_code: int, message: str = "") -> None:
    """Leave the exit status of this process, and for anything but success why. Rank 0 only.

    Nothing is written into a directory that another process works in. One that this process never marked as
    running (bad input was found before) gets the file under torchrun only: elsewhere the exit status itself
    says it.
    """
    status = _NAMES.get(exit_code, "failed")
    if (_read(run_dir) or {}).get("pid") == os.getpid():
        _write(run_dir, status, exit_code, message)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        run = RunDir(run_dir)
        try:
            run.acquire()
        except InputError:
            return
        _write(run_dir, status, exit_code, message)
        run.release()


def deliberate_end(run_dir: Path) -> int | None:
    """The exit status a restarted worker must end with at once; None where it should work.

    Only a restart by torchrun counts (``TORCHELASTIC_RESTART_COUNT`` above 0): a person who starts a stopped
    run again wants it to go on.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    exit_code = (_read(run_dir) or {}).get("exit_code")
    return exit_code if exit_code in (BAD_INPUT, STOPPED) else None


def _write(run_dir: Path, status: str, exit_code: int | None, message: str) -> None:
    content = {"status": status, "exit_code": exit_code, "message": message, "pid": os.getpid()}
    replace_file(run_dir / "status.json", (json.dumps(content) + "\n").encode())


def _read(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
