"""Documents of text: the interpreter's standard library, local files, or a Hugging Face dataset.

A ``TextSource`` is a name, an identity (what changes when the text may have changed; part of the cache key)
and a function that streams the documents. Nothing is loaded whole: plain text is read in pieces, and JSON
lines, Parquet and hub datasets go through ``datasets`` with streaming. No dataset code is ever run.
"""

import glob
import hashlib
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from bitmoe.config.errors import InputError

# A plain text file is one document; a longer one is several, so that memory stays bounded.
DOCUMENT_CHARS = 4 * 2**20
# Tests and applications: several times the size of the library proper, and much of it data tables.
STDLIB_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
FOLDER_SUFFIXES = {".txt", ".text", ".md", *READERS}


@dataclass(frozen=True)
class TextSource:
    """Text that can be read again and again."""

    name: str
    """What to call it in messages and tables."""
    identity: dict[str, object]
    """JSON-able description that changes when the text may have changed."""
    documents: Callable[[], Iterator[str]]
    """Streams the documents, in the same order each time; none is empty."""


def stdlib_source() -> TextSource:
    """Return the Python files of the running interpreter's standard library, sorted, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_EXCLUDED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    identity = {
        "kind": "stdlib",
        "python": platform.python_version(),
        "files": len(files),
        "sha256": _digest([file.relative_to(root).as_posix(), file.stat().st_size] for file in files),
    }
    return TextSource("stdlib", identity, lambda: filter(None, chain.from_iterable(map(_decodable, files))))


def files_source(path: str, text_key: str = "text") -> TextSource:
    """Return the documents of one file, of a folder, or of all files that match a glob.

    Args:
        path: ``.jsonl``, ``.json`` (``.gz`` and the like too) or ``.parquet``: a document a row; anything
            else is UTF-8 text, a document a file. A folder is searched for the endings of
            ``FOLDER_SUFFIXES``.
        text_key: column of the text in rows.

    Raises:
        InputError: nothing there. The documents raise it for text that cannot be read.
    """
    files = _find(path)
    identity = {
        "kind": "files",
        "path": path,
        "text_key": text_key,
        "files": len(files),
        "sha256": _digest([str(file.resolve()), *_size_and_time(file)] for file in files),
    }
    readers = [partial(_file_documents, file, text_key) for file in files]
    return TextSource(path, identity, lambda: filter(None, chain.from_iterable(read() for read in readers)))


def hub_source(name: str, text_key: str = "text") -> TextSource:
    """Return the train split of a dataset on the Hugging Face hub, streamed.

    Its identity is its name: a change on the hub is not noticed; delete the cache to read it again.

    Args:
        name: ``owner/name``, or ``owner/name:configuration``.
        text_key: column of the text.
    """
    dataset, _, configuration = name.partition(":")
    identity = {"kind": "hub", "name": name, "text_key": text_key}
    arguments = {"path": dataset, "name": configuration or None}
    return TextSource(name, identity, lambda: filter(None, _rows(arguments, name, text_key, "data.name")))


def limit_bytes(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Yield documents until ``max_bytes`` bytes of UTF-8 (None: all); the last one is cut to fit."""
    left = float("inf") if max_bytes is None else max_bytes
    for text in documents:
        size = len(text.encode("utf-8", errors="replace"))
        if size > left:
            cut = text.encode("utf-8", errors="replace")[: int(left)].decode("utf-8", errors="ignore")
            if cut:
                yield cut
            return
        left -= size
        yield text


def _find(path: str) -> list[Path]:
    """The files behind a path of the config, sorted."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if _suffix(f) in FOLDER_SUFFIXES and f.is_file())
        if not files:
            raise InputError(
                f"the folder {path} holds no text (looked for {' '.join(sorted(FOLDER_SUFFIXES))})",
                fix="give the files themselves or a glob such as 'folder/**/*.py'",
                key="data.path",
            )
        return files
    if place.is_file():
        return [place]
    files = sorted(Path(file) for file in glob.glob(str(place), recursive=True) if os.path.isfile(file))
    if not files:
        raise InputError(
            f"{path} does not exist",
            fix="give a file, a folder, a glob, or the prefix of a .bin/.idx pair",
            key="data.path",
        )
    return files


def _size_and_time(file: Path) -> tuple[int, int]:
    """What tells that a file was changed, in bytes and nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _suffix(file: Path) -> str:
    """The ending that says what a file holds: ``.jsonl`` for ``a.jsonl.gz``."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def _decodable(file: Path) -> Iterator[str]:
    """The file as one document, or nothing if it is not UTF-8."""
    try:
        yield file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return


def _file_documents(file: Path, text_key: str) -> Iterator[str]:
    """Documents of one file. Empty files have none."""
    reader = READERS.get(_suffix(file))
    if reader and file.stat().st_size:
        arguments = {"path": reader, "data_files": [str(file.resolve())]}
        yield from _rows(arguments, str(file), text_key, "data.path")
        return
    try:
        with open(file, encoding="utf-8", newline="") as stream:
            while piece := stream.read(DOCUMENT_CHARS):
                yield piece
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 text: {error}", fix="convert it or leave it out", key="data.path"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", key="data.path") from error


def _rows(arguments: dict[str, object], name: str, text_key: str, key: str) -> Iterator[str]:
    """The text column of what ``datasets.load_dataset`` streams; ``name`` and ``key`` are for messages."""
    for row in _stream(arguments, name, key):
        if text_key not in row:
            raise InputError(
                f"{name} has no column {text_key!r}; it has {', '.join(sorted(row))}",
                fix="set it to the column that holds the text",
                key="data.text_key",
            )
        text = row[text_key]
        if not isinstance(text, str | None):
            raise InputError(f"column {text_key!r} of {name} holds {text!r:.80}, not text", key="data.text_key")
        if text:
            yield text


def _stream(arguments: dict[str, object], name: str, key: str) -> Iterator[dict]:
    """Rows of a dataset; whatever goes wrong inside the library becomes one message that names it."""
    from datasets import load_dataset
    from datasets.utils.logging import set_verbosity

    # It logs what it then raises; one message is enough.
    set_verbosity(logging.CRITICAL)
    try:
        yield from load_dataset(**arguments, split="train", streaming=True)
    except Exception as error:  # the library lets errors of pyarrow, fsspec and the network through
        raise InputError(f"cannot read {name}: {type(error).__name__}: {error}", key=key) from error


def _digest(entries: Iterable[list]) -> str:
    """SHA-256 of a list of JSON-able entries."""
    return hashlib.sha256(json.dumps(list(entries)).encode()).hexdigest()
