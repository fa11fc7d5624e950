"""Text to token ids and back.

Two classes share one small protocol: ``ByteTokenizer`` (256 bytes and three specials, no file needed) and
``JsonTokenizer`` (any ``tokenizer.json`` of Hugging Face's ``tokenizers``, also the one trained by
``bpe.py``). Each can save itself into a folder and be loaded from it, so that a checkpoint carries its
tokenizer, and each has a fingerprint that token files and checkpoints are compared with. Special tokens
spelled out in a text are encoded as plain text: only the code that builds documents may write an
end-of-document token.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from bitmoe.config.choices import TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.config.schema import TokenizerConfig

JSON_FILE = "tokenizer.json"
KIND_FILE = "tokenizer_kind.json"
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>")


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer."""

    vocab_size: int
    """Ids are in [0, vocab_size)."""
    eod_id: int
    """The token that ends a document."""
    fingerprint: str
    """SHA-256 (hex) of everything that decides the ids."""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, int64 [tokens], without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, as ``encode`` does; parallel where the tokenizer can."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens and ids outside the vocabulary are left out."""

    def save(self, folder: Path) -> None:
        """Write what ``load_tokenizer`` needs into an existing folder."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then end of document, beginning of text and padding."""

    eod_id = 256
    bos_id = 257
    pad_id = 258
    vocab_size = 259
    fingerprint = hashlib.sha256(b"bitmoe byte tokenizer: 256 bytes, eod, bos, pad").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of the text, int64 [bytes]; lone surrogates become ``?``."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD, ids that are no byte are left out."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write ``tokenizer_kind.json``."""
        _write_kind(folder, {"kind": "byte"})


class JsonTokenizer:
    """A tokenizer of the ``tokenizers`` library.

    Args:
        content: the text of its ``tokenizer.json``, kept as it is.
        eod_token: the token that ends a document; None tries ``EOD_NAMES`` in order.
        name: what to call it in messages.

    Raises:
        InputError: content that is no tokenizer, or no end-of-document token in the vocabulary.
    """

    def __init__(self, content: str, eod_token: str | None = None, name: str = JSON_FILE):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise InputError(
                f"{name} is not a tokenizer.json: {error}",
                fix="give the tokenizer.json that Hugging Face's tokenizers library writes",
                key="tokenizer.path",
            ) from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        names = EOD_NAMES if eod_token is None else (eod_token,)
        self.eod_token = next((token for token in names if token in vocabulary), None)
        if self.eod_token is None:
            raise InputError(
                f"{name} has no end-of-document token (looked for {', '.join(names)})",
                fix="set tokenizer.eod_token to the token that ends a document",
                key="tokenizer.eod_token",
            )
        # Settings kept in the file for other uses: they would cut documents short or pad them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._content = content
        self.eod_id = vocabulary[self.eod_token]
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(f"{content}\0{self.eod_token}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, int64 [tokens]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text; the library uses all cores."""
        clean = [text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_kind.json``."""
        (folder / JSON_FILE).write_text(self._content, encoding="utf-8", newline="")
        _write_kind(folder, {"kind": "file", "eod_token": self.eod_token})


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer of ``kind=byte`` or ``kind=file``; ``prepare`` trains the one of ``kind=bpe``.

    Raises:
        InputError: a missing or unreadable file, or one that is no tokenizer.
        ValueError: ``kind=bpe``, which needs text.
    """
    if config.kind is TokenizerKind.byte:
        return ByteTokenizer()
    if config.kind is TokenizerKind.bpe:
        raise ValueError("kind=bpe is trained on text: use bitmoe.data.prepare.prepare_tokenizer")
    return JsonTokenizer(_read(Path(config.path)), config.eod_token, name=config.path)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer that ``save`` wrote into ``folder``.

    Raises:
        InputError: missing or damaged files.
    """
    try:
        kind = json.loads(_read(folder / KIND_FILE))
        is_byte, eod_token = kind["kind"] == "byte", kind.get("eod_token")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / KIND_FILE} is damaged: {error!r}", fix="use another copy of the folder") from error
    if is_byte:
        return ByteTokenizer()
    return JsonTokenizer(_read(folder / JSON_FILE), eod_token, name=str(folder / JSON_FILE))


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read the tokenizer {file}: {error.strerror}",
            fix="give the path of a tokenizer.json",
            key="tokenizer.path",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not a tokenizer.json: {error}", key="tokenizer.path") from error


def _write_kind(folder: Path, kind: dict[str, str]) -> None:
    (folder / KIND_FILE).write_text(json.dumps(kind) + "\n", encoding="utf-8")
