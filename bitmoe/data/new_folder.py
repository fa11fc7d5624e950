"""A folder that appears whole or not at all: temporary name, fsync, rename.

Several processes may write the same folder at the same time: the first rename wins and the others discard
their work, which is as good because the content is determined by the name.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``final``; when the block ends well, it is renamed to ``final``.

    When the block raises, the temporary folder is removed and ``final`` does not appear. A killed process
    leaves a hidden folder with a unique name, which nothing reads.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        try:
            os.rename(temporary, final)
        except OSError:
            # Another process was first.
            if not final.is_dir():
                raise
        _fsync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
