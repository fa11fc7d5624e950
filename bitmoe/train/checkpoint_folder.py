"""The folder of a run's checkpoints: names, commit by rename, which is the newest, which may go.

``step_00000100/`` is a committed checkpoint, ``step_00000100.tmp-<id>/`` one being written or left by a killed save.
A kill at any moment leaves the older ones as they were. All functions are for rank 0 alone; none needs torch.
"""

import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from bitmoe.config.errors import InputError
from bitmoe.train.manifest import MANIFEST, read_manifest, verify
from bitmoe.train.run_dir import require_space, sync_folder

_COMMITTED = re.compile(r"step_(\d+)")
_TEMPORARY = ".tmp-"


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over.

    Args:
        folder: ``<run>/checkpoints``; need not exist.
        warn: told why a checkpoint was passed over.

    Returns:
        Its path; None if there is no checkpoint at all.

    Raises:
        InputError: there are checkpoints, and none of them can be used.
    """
    found = _committed(folder)
    for path in found:
        try:
            verify(path)
        except InputError as refused:
            warn(refused.what)
        else:
            return path
    if found:
        raise InputError(
            f"none of the {len(found)} checkpoints in {folder} can be used",
            fix="restore one; to start from the beginning, move them away or choose another run.name",
            key="run.resume",
        )
    return None


def saved_state(path: Path) -> dict:
    """The ``state`` a verified checkpoint was saved with; its other files are not looked at."""
    return read_manifest(path / MANIFEST)["state"]


def open_temporary(folder: Path, step: int, needed_bytes: int) -> Path:
    """Make the folder a checkpoint is written into, after removing what killed saves left.

    Raises:
        InputError: there is not enough space, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"step_*{_TEMPORARY}*"):
            shutil.rmtree(left)
        require_space(folder, needed_bytes, what=f"the checkpoint of step {step}")
        temporary = _temporary_name(folder / f"step_{step:08d}")
        temporary.mkdir()
    except OSError as error:
        raise InputError(
            f"cannot write checkpoints to {folder}: {error.strerror}",
            fix="correct its permissions or choose another place",
            key="run.dir",
        ) from error
    return temporary


def commit(temporary: Path, keep: int) -> Path:
    """Give a complete checkpoint its name, then remove those that are too old.

    Args:
        temporary: from ``open_temporary``, with its manifest.
        keep: how many checkpoints to keep, this one included.

    Returns:
        The checkpoint's path.
    """
    final = temporary.with_name(temporary.name.partition(_TEMPORARY)[0])
    sync_folder(temporary)
    replaced = _temporary_name(final)
    if final.exists():
        # A damaged one of the same step, passed over when the run was continued.
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    _remove(replaced)
    for path in _too_old(final, max(keep, 1)):
        _remove(path)
    return final


def _committed(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first, whole or not."""
    paths = [path for path in folder.glob("step_*") if _COMMITTED.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _temporary_name(final: Path) -> Path:
    return final.with_name(f"{final.name}{_TEMPORARY}{uuid.uuid4().hex[:12]}")


def _too_old(newest: Path, keep: int) -> list[Path]:
    """Checkpoints older than the ``keep`` newest ones.

    Later steps than ``newest`` are damaged ones the run went back behind: they neither count nor go.
    """
    until_now = [path for path in _committed(newest.parent) if _step_of(path) <= _step_of(newest)]
    kept = [path for path in until_now if (path / MANIFEST).exists()][:keep]
    return [path for path in until_now if _step_of(path) < _step_of(kept[-1])]


def _remove(path: Path) -> None:
    """Remove a checkpoint, its manifest first: what is left after a kill cannot be taken for a whole one."""
    (path / MANIFEST).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)
