"""Megatron's token files: validation and reading of a ``<prefix>.bin`` / ``<prefix>.idx`` pair.

Format of ``.idx`` (little endian): ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 sequences S, u64
document entries D, int32 lengths [S], int64 byte pointers [S], int64 document index [D] (first sequence of
each document, then S). ``.bin`` is all sequences behind each other. megatron-core reads the same files, but
checks little: a truncated pair fails at a random later step and a wrong dtype code reads wrong tokens. Here
both are refused before anything starts. A pair written by ``prepare`` has a sidecar ``<prefix>.tokens.json``.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bitmoe.config.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SCAN_TOKENS = 2**24
REDO = "delete the pair and write it again with `bitmoe prepare` or Megatron's preprocessing"


@dataclass(frozen=True)
class TokenFile:
    """An open, structurally valid pair."""

    prefix: Path
    """Common path of the pair without its ending."""
    tokens: np.ndarray
    """All tokens of the ``.bin``, memory-mapped, integer [N]."""
    lengths: np.ndarray
    """Tokens of each sequence, int32 [S]."""
    document_index: np.ndarray
    """First sequence of each document, then S; int64 [documents + 1]."""
    sidecar: dict[str, object] | None
    """What ``prepare`` noted about the pair, if it wrote it."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_index) - 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the tokens: of the ``.bin`` (sidecar), else of the ``.idx``."""
        if self.sidecar:
            return str(self.sidecar["sha256"])
        with open(path_of(self.prefix, ".idx"), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def path_of(prefix: Path, ending: str) -> Path:
    """Return ``<prefix><ending>``; ``Path.with_suffix`` would eat a dot in the name."""
    return prefix.parent / (prefix.name + ending)


def token_prefix(path: str) -> Path | None:
    """Return the prefix if ``path`` names token files: ``x.bin``, ``x.idx``, or ``x`` that is nothing itself.

    Either file of the pair is enough: ``open_token_file`` names the missing one.
    """
    prefix = Path(path.removesuffix(".bin").removesuffix(".idx")).expanduser()
    if str(prefix) == path and prefix.exists():
        return None
    return prefix if any(path_of(prefix, ending).is_file() for ending in (".bin", ".idx")) else None


def open_token_file(prefix: Path) -> TokenFile:
    """Open a pair after checking that its two files agree.

    Raises:
        InputError: a file is missing or unreadable; wrong magic, version or dtype code; truncated; lengths,
            pointers and document index that contradict each other; no tokens; a sidecar about other tokens.
    """
    bin_path, idx_path = path_of(prefix, ".bin"), path_of(prefix, ".idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise _error(f"{path} is missing", "give a prefix for which both .bin and .idx exist")
    try:
        dtype, lengths, pointers, document_index = _read_index(idx_path)
        size = bin_path.stat().st_size
        total = _check_index(idx_path, lengths, pointers, document_index, np.dtype(dtype).itemsize)
        if size != total:
            raise _error(f"{bin_path} has {size} bytes, but {idx_path.name} describes {total}")
        tokens = np.memmap(bin_path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
        sidecar = _read_sidecar(path_of(prefix, ".tokens.json"), size)
    except OSError as error:
        raise _error(f"cannot read {error.filename}: {error.strerror}", "check the file's permissions") from error
    return TokenFile(prefix, tokens, lengths, document_index, sidecar)


def check_tokens(file: TokenFile, vocab_size: int, tokenizer_fingerprint: str) -> None:
    """Check that a pair was made for this tokenizer.

    The ids are scanned once; a pair with a sidecar has its largest id noted there.

    Raises:
        InputError: the sidecar names another tokenizer, or an id is outside [0, vocab_size).
    """
    if file.sidecar:
        smallest, largest = 0, int(file.sidecar["max_id"])
        made_with = file.sidecar["tokenizer"]
        if made_with != tokenizer_fingerprint:
            raise InputError(
                f"{file.prefix} was made with another tokenizer "
                f"({made_with:.12}, this run has {tokenizer_fingerprint:.12})",
                fix="set tokenizer.* as it was, or prepare the text again",
                key="tokenizer.kind",
            )
    else:
        chunks = [file.tokens[i : i + SCAN_TOKENS] for i in range(0, len(file.tokens), SCAN_TOKENS)]
        smallest, largest = min(int(c.min()) for c in chunks), max(int(c.max()) for c in chunks)
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise InputError(
            f"{path_of(file.prefix, '.bin')} holds token id {wrong}, outside the vocabulary of {vocab_size}",
            fix="use the tokenizer the file was made with",
            key="tokenizer.kind",
        )


def _read_index(idx_path: Path) -> tuple[type, np.ndarray, np.ndarray, np.ndarray]:
    """dtype of the tokens, lengths, pointers and document index, after checks of header and size."""
    size = idx_path.stat().st_size
    if size < HEADER.size:
        raise _error(f"{idx_path} has {size} bytes, less than its header of {HEADER.size}")
    with open(idx_path, "rb") as stream:
        magic, version, code, sequences, entries = HEADER.unpack(stream.read(HEADER.size))
    if magic != MAGIC:
        raise _error(f"{idx_path} is not an index of token files (it begins with {magic!r})")
    if version != VERSION:
        raise _error(f"{idx_path} has version {version}, not {VERSION}")
    if code not in DTYPES:
        raise _error(f"{idx_path} has dtype code {code}, not one of whole numbers: {', '.join(map(str, DTYPES))}")
    expected = HEADER.size + 12 * sequences + 8 * entries
    if size != expected:
        raise _error(f"{idx_path} has {size} bytes, but its header describes {expected}")
    if sequences == 0:
        raise _error(f"{idx_path} is empty: no sequences", "prepare text that is not empty")
    data = np.memmap(idx_path, mode="r", offset=HEADER.size)
    lengths, pointers, document_index = np.split(data, [4 * sequences, 12 * sequences])
    return DTYPES[code], lengths.view("<i4"), pointers.view("<i8"), document_index.view("<i8")


def _check_index(
    idx_path: Path, lengths: np.ndarray, pointers: np.ndarray, document_index: np.ndarray, item: int
) -> int:
    """Check the arrays against each other and return the bytes the ``.bin`` must have."""
    ends = np.cumsum(lengths, dtype=np.int64) * item
    if lengths.min() < 0 or pointers[0] != 0 or not np.array_equal(pointers[1:], ends[:-1]):
        raise _error(f"{idx_path} disagrees with itself: its pointers do not follow its lengths")
    ordered = len(document_index) > 1 and (np.diff(document_index) >= 0).all()
    if not ordered or document_index[0] != 0 or document_index[-1] != len(lengths):
        raise _error(f"{idx_path} disagrees with itself: its document index does not cover its sequences")
    if ends[-1] == 0:
        raise _error(f"{idx_path} is empty: no tokens", "prepare text that is not empty")
    return int(ends[-1])


def _read_sidecar(path: Path, bin_bytes: int) -> dict[str, object] | None:
    """The sidecar, if there is one, checked to be about this ``.bin``."""
    if not path.is_file():
        return None
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        same = sidecar["bin_bytes"] == bin_bytes
        complete = {"tokenizer", "max_id", "sha256", "text_bytes"} <= sidecar.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        same = complete = False
    if not (same and complete):
        raise _error(
            f"{path} is damaged or describes another .bin",
            "delete all files of this prefix and prepare again",
        )
    return sidecar


def _error(what: str, fix: str = REDO) -> InputError:
    return InputError(what, fix=fix, key="data.path")
