"""Commit, choice and removal of checkpoints: a kill at any moment leaves a whole one, and damage is passed over."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from bitmoe.config.errors import InputError
from bitmoe.train.checkpoint_folder import commit, newest_checkpoint, open_temporary
from bitmoe.train.manifest import MANIFEST, verify, write_manifest


def save(folder, step, keep=10):
    """A checkpoint with two files that say which step wrote them."""
    temporary = open_temporary(folder, step, 1000)
    for name in ("a.distcp", "b.distcp"):
        (temporary / name).write_text(f"{name} of step {step}")
    write_manifest(temporary, {"step": step})
    return commit(temporary, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def newest(folder):
    warnings = []
    return newest_checkpoint(folder, warnings.append), warnings


def test_newest_checkpoint_of_nothing(tmp_path):
    assert newest(tmp_path / "checkpoints") == (None, [])


def test_newest_checkpoint_is_the_highest_step(tmp_path):
    saved = [save(tmp_path, step) for step in (9, 100, 20)]
    assert [path.name for path in saved] == ["step_00000009", "step_00000100", "step_00000020"]
    assert newest(tmp_path) == (saved[1], [])


def test_newest_checkpoint_passes_over_damaged_ones(tmp_path):
    oldest, middle, last = (save(tmp_path, step) for step in (1, 2, 3))
    (last / "a.distcp").write_text("?")
    (middle / MANIFEST).unlink()
    found, warnings = newest(tmp_path)
    assert found == oldest
    assert [text.split(":")[0] for text in warnings] == [f"checkpoint {last}", f"checkpoint {middle}"]
    assert "a.distcp" in warnings[0]
    assert MANIFEST in warnings[1]


def test_newest_checkpoint_refuses_when_none_is_whole(tmp_path):
    (save(tmp_path, 1) / "b.distcp").unlink()
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        newest(tmp_path)


def test_commit_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
        assert newest(tmp_path)[0].name == f"step_{step:08d}"
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


def test_commit_does_not_count_damaged_later_ones(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (3, 4):
        (tmp_path / f"step_{step:08d}" / "a.distcp").unlink()
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    assert newest(tmp_path)[0].name == "step_00000003"


def test_open_temporary_removes_what_killed_saves_left(tmp_path):
    save(tmp_path, 1)
    left = open_temporary(tmp_path, 2, 1000)
    (left / "part").write_text("half")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_open_temporary_refuses_when_space_is_short(tmp_path):
    with pytest.raises(InputError, match=r"the checkpoint of step 7 needs .* GiB, but .* GiB free"):
        open_temporary(tmp_path, 7, 2 * shutil.disk_usage(tmp_path).total)
    assert names(tmp_path) == []


def test_open_temporary_refuses_a_place_it_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write checkpoints"):
        open_temporary(tmp_path / "file" / "checkpoints", 1, 0)


BOUNDARIES = ("fsync", "rename", "replace", "unlink", "rmdir", "chmod", "mkdir")


def save_until_killed(folder, step, boundary):
    """Save in a process that is killed just before its ``boundary``-th change of the file system."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = boundary

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in BOUNDARIES:
        setattr(os, name, counted(getattr(os, name)))
    save(folder, step, keep=1)
    os._exit(0)


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_kill_at_every_boundary_leaves_a_whole_checkpoint(tmp_path, step):
    boundary, outcomes = 0, []
    while True:
        folder: Path = tmp_path / str(boundary)
        save(folder, 0)
        save(folder, 1)
        killed = save_until_killed(folder, step, boundary)
        found, _ = newest(folder)
        outcomes.append(found.name)
        assert verify(found)["step"] == int(found.name.removeprefix("step_"))
        save(folder, 5, keep=1)
        assert names(folder) == ["step_00000005"]
        if not killed:
            break
        boundary += 1
    assert boundary > 12
    assert outcomes[0] == "step_00000001"
    assert outcomes[-1] == f"step_{step:08d}"
