"""The status file: what a run leaves, when nothing may be written, and who must end at once."""

import json
import os

import pytest

from bitmoe.train.run_dir import RunDir
from bitmoe.train.status import deliberate_end, write_ended, write_running


def read(run_dir):
    return json.loads((run_dir / "status.json").read_text())


@pytest.mark.parametrize(("code", "name"), [(0, "done"), (2, "bad_input"), (75, "stopped"), (1, "failed")])
def test_a_run_leaves_its_end(tmp_path, code, name):
    write_running(tmp_path)
    assert (read(tmp_path)["status"], read(tmp_path)["exit_code"]) == ("running", None)
    write_ended(tmp_path, code, "why")
    assert read(tmp_path) == {"status": name, "exit_code": code, "message": "why", "pid": os.getpid()}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_bad_input_before_the_run_makes_a_status_under_torchrun_alone(tmp_path, monkeypatch):
    write_ended(tmp_path / "run", 2, "why")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    write_ended(tmp_path / "run", 2, "why")
    assert read(tmp_path / "run")["status"] == "bad_input"


def test_status_of_a_run_in_use_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    (tmp_path / "status.json").write_text('{"status": "running", "exit_code": null, "pid": 0}')
    other = RunDir(tmp_path)
    other.acquire()
    write_ended(tmp_path, 2, "in use")
    other.release()
    assert read(tmp_path)["status"] == "running"


@pytest.mark.parametrize(
    ("restarts", "code", "expected"),
    [("1", 2, 2), ("3", 75, 75), ("1", 1, None), ("1", 0, None), ("0", 2, None), (None, 75, None)],
)
def test_deliberate_end(tmp_path, monkeypatch, restarts, code, expected):
    write_running(tmp_path)
    write_ended(tmp_path, code)
    if restarts is None:
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert deliberate_end(tmp_path) == expected


def test_deliberate_end_of_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert deliberate_end(tmp_path / "nothing") is None
