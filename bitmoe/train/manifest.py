"""``manifest.json``: what a checkpoint consists of, and the proof that it is whole.

It lists every file with size and SHA-256, and carries a checksum of itself. A folder without a manifest that holds is
no checkpoint, so writing it comes last and removing it comes first. This finds damage (truncated, flipped, missing,
mixed up), before any reader parses the files; it is no signature. megatron-core's own files hold pickles, so a
checkpoint that another user owns, or could have written to, is refused as well.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bitmoe.config.errors import InputError
from bitmoe.train.run_dir import replace_file

SCHEMA = 1
MANIFEST = "manifest.json"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Sync and hash all files of ``folder``, take write permission from others, and write the manifest.

    Args:
        folder: holds the complete checkpoint.
        content: entries to store beside the files; JSON without NaN.
    """
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor() as pool:
        records = list(pool.map(_seal, paths))
    body = {"schema": SCHEMA, **content, "files": {p.name: r for p, r in zip(paths, records, strict=True)}}
    body["checksum"] = _checksum(body)
    replace_file(folder / MANIFEST, json.dumps(body, indent=1, allow_nan=False).encode())
    for path in (folder / MANIFEST, folder):
        _keep_others_out(path)


def verify(folder: Path) -> dict[str, Any]:
    """Check that a checkpoint is ours and whole.

    Returns:
        The manifest.

    Raises:
        InputError: it is not; names the file and the reason.
    """
    try:
        _refuse_strangers([folder, folder / MANIFEST])
        body = read_manifest(folder / MANIFEST)
        files = body["files"]
        _compare_names(folder, set(files))
        paths = [folder / name for name in files]
        _refuse_strangers(paths)
        with ThreadPoolExecutor() as pool:
            for problem in pool.map(_problem, paths, files.values()):
                if problem:
                    raise _refusal(folder, problem)
    except OSError as error:
        raise _refusal(folder, f"{Path(error.filename or folder).name}: {error.strerror}") from error
    return body


def _seal(path: Path) -> dict[str, Any]:
    _keep_others_out(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _keep_others_out(path: Path) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_OTHERS_WRITE)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and check it against its own checksum, not the files it lists.

    Raises:
        InputError: it is damaged, or newer than this version.
    """
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise _refusal(path.parent, f"{MANIFEST} is not a manifest ({error})") from error
    schema = body.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise InputError(
            f"checkpoint {path.parent}: {MANIFEST} has schema {schema}, this version reads up to {SCHEMA}",
            fix="use the version of bitmoe that wrote it, or a newer one",
        )
    if body.pop("checksum", None) != _checksum(body):
        raise _refusal(path.parent, f"{MANIFEST} was changed after it was written")
    return body


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _compare_names(folder: Path, listed: set[str]) -> None:
    present = set(os.listdir(folder)) - {MANIFEST}
    if listed - present:
        raise _refusal(folder, f"missing {', '.join(sorted(listed - present))}")
    if present - listed:
        raise InputError(
            f"checkpoint {folder}: {', '.join(sorted(present - listed))} does not belong to it",
            fix="remove what was put there",
        )


def _refuse_strangers(paths: Iterable[Path]) -> None:
    """Refuse what another user may have written: such files could make the reader run code."""
    for path in paths:
        status = path.lstat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise InputError(f"{path} is neither a file nor a folder", fix="copy the checkpoint with its contents")
        if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
            raise InputError(
                f"{path} belongs to another user, or others may write to it; checkpoints can hold code",
                fix="if you trust whoever wrote it, make it yours: chown and chmod -R go-w",
            )


def _problem(path: Path, record: dict[str, Any]) -> str:
    """What is wrong with one file, or an empty string."""
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"{path.name} has {size} bytes, {record['bytes']} were written"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == record["sha256"] else f"{path.name} was changed after it was written (SHA-256 differs)"


def _refusal(folder: Path, problem: str) -> InputError:
    return InputError(f"checkpoint {folder}: {problem}", fix="restore the file, or continue from another checkpoint")
