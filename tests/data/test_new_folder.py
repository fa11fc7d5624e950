"""Folders that appear whole or not at all, also when processes compete."""

import os
import subprocess
import sys

import pytest

from bitmoe.data.new_folder import new_folder

# Each process writes its name into two files of every folder; a mixture would show.
COMPETITOR = """
import sys
from pathlib import Path
from bitmoe.data.new_folder import new_folder
print("ready", flush=True)
sys.stdin.readline()
for number in range(50):
    with new_folder(Path(sys.argv[1], str(number))) as folder:
        for name in "ab":
            (folder / name).write_text(sys.argv[2])
"""


def test_new_folder_appears_at_the_end(tmp_path):
    with new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "deep" / "new").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    assert (tmp_path / "deep" / "new" / "file").read_text() == "content"


def write_half(final, error):
    with new_folder(final) as folder:
        (folder / "file").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_new_folder_leaves_nothing_on_error(tmp_path, error):
    with pytest.raises(error):
        write_half(tmp_path / "new", error)
    assert list(tmp_path.iterdir()) == []


def test_new_folder_keeps_the_first(tmp_path):
    with new_folder(tmp_path / "new") as late:
        (late / "file").write_text("late")
        with new_folder(tmp_path / "new") as early:
            (early / "file").write_text("early")
    assert (tmp_path / "new" / "file").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_new_folder_with_competing_processes(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    command = [sys.executable, "-c", COMPETITOR, str(tmp_path)]
    competitors = [subprocess.Popen([*command, name], **pipes) for name in ("one", "two")]
    assert [process.stdout.readline() for process in competitors] == ["ready\n"] * 2
    for process in competitors:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in competitors:
        process.communicate()
        assert process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(50)))
    for folder in tmp_path.iterdir():
        contents = {name: (folder / name).read_text() for name in os.listdir(folder)}
        assert contents in ({"a": "one", "b": "one"}, {"a": "two", "b": "two"})
