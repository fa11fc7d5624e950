"""The folder a conversion writes: under its name it is whole and durable, or not there.

It is filled under a hidden name beside the final one, synced, and renamed. The hidden folder is locked while it is
filled, so a second conversion to the same place is refused, and what a killed one left is told from it and removed.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bitmoe.config.errors import InputError
from bitmoe.train.run_dir import require_space, sync_folder

_READABLE = 0o644


@contextmanager
def output_folder(final: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends well it gets its final name, else it is removed.

    Args:
        final: must not exist; its parent is made.
        needed_bytes: room it will take.

    Raises:
        InputError: too little space, no permission, another conversion to the same place, or one that was faster.
    """
    temporary = final.parent / f".{final.name}.converting"
    require_space(final, needed_bytes, what="the converted model", key="out")
    with _file_system_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(temporary)
    try:
        with _file_system_errors(final):
            yield temporary
            for path in temporary.iterdir():
                _seal(path, stat.S_IMODE(temporary.stat().st_mode) & _READABLE)
            sync_folder(temporary)
            if final.exists():
                raise InputError(f"{final} has appeared meanwhile", fix="choose another folder", key="out")
            temporary.rename(final)
            sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _open_locked(temporary: Path) -> int:
    """Make an empty locked folder in place of what a killed conversion left."""
    for _ in range(2):
        temporary.mkdir(exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(
                f"another conversion is writing to {temporary.name.removeprefix('.').removesuffix('.converting')}",
                fix="wait for it, or choose another folder",
                key="out",
            ) from None
        if not any(temporary.iterdir()):
            return lock
        shutil.rmtree(temporary)
        os.close(lock)
    raise InputError(f"{temporary} fills while it is emptied", fix="choose another folder", key="out")


def _seal(path: Path, mode: int) -> None:
    """Make a file durable, and give it its mode: the safetensors library makes files for their owner alone."""
    path.chmod(mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _file_system_errors(final: Path) -> Iterator[None]:
    """No space, no permission: one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {final} ({getattr(error, 'strerror', None) or error})",
            fix="make room, correct permissions, or choose another folder",
            key="out",
        ) from error
