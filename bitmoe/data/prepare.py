"""``bitmoe prepare``: from the configured text to token files, once.

Text is tokenized into ``<data.cache>/<name>-<key>/{train,eval}.{bin,idx,tokens.json}``; the key covers
everything that decides the tokens (source, files with sizes and times, tokenizer, split), so a second call
finds the folder and reads no text. Token files made elsewhere are used as they are; the end of each is held
out.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from bitmoe.config.choices import Source, TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config, DataConfig
from bitmoe.data.bpe import EOD_TOKEN, train_bpe
from bitmoe.data.new_folder import new_folder
from bitmoe.data.progress import PrepareProgress
from bitmoe.data.split import EVAL, TRAIN, assign_splits
from bitmoe.data.text import TextSource, files_source, hub_source, limit_bytes, stdlib_source
from bitmoe.data.token_data import TokenData, TokenPart, TokenSpan
from bitmoe.data.token_files import TokenFile, check_tokens, open_token_file, token_prefix
from bitmoe.data.token_writer import TokenWriter
from bitmoe.data.tokenizer import JsonTokenizer, Tokenizer, build_tokenizer, load_tokenizer

# Raise it when the same text would be tokenized or split differently, so that old caches are not used.
CACHE_VERSION = 1
BATCH_CHARS = 2**20
BATCH_DOCUMENTS = 256


def prepare(config: Config) -> TokenData:
    """Make sure that token files exist for the configured text, and describe them.

    Several processes may call it at once; in a job, let one rank call it first, so that the others find the
    cache.

    Raises:
        InputError: text that is missing, empty or unreadable; damaged token files, or ones of another
            tokenizer; paths that the configured source does not read; a cache folder that cannot be written.
    """
    entries = _entries(config.data)
    tokenizer = prepare_tokenizer(config, [entry for entry in entries if isinstance(entry, TextSource)])
    parts = tuple(
        _text_part(entry, tokenizer, config.data)
        if isinstance(entry, TextSource)
        else _token_file_part(entry, tokenizer, config.data.eval_fraction)
        for entry in entries
    )
    return TokenData(parts, tuple(config.data.weights) or None, tokenizer)


def prepare_tokenizer(config: Config, sources: list[TextSource]) -> Tokenizer:
    """Return the configured tokenizer; ``kind=bpe`` is trained on the training split of the text and cached.

    Raises:
        InputError: see ``build_tokenizer``; for ``kind=bpe`` also when there is no text to train on.
    """
    if config.tokenizer.kind is not TokenizerKind.bpe:
        return build_tokenizer(config.tokenizer)
    if not sources:
        raise InputError(
            "kind=bpe is trained on text, but data.path holds token files only",
            fix="use tokenizer.kind=file with the tokenizer.json they were made with",
            key="tokenizer.kind",
        )
    identities = [source.identity for source in sources]
    key = _key(identities, _split_settings(config.data), config.tokenizer.vocab_size)
    folder = Path(config.data.cache) / f"tokenizer-{key}"
    if not folder.is_dir():
        splits = chain.from_iterable(_splits(source, config.data) for source in sources)
        content = train_bpe((text for split, text in splits if split == TRAIN), config.tokenizer.vocab_size)
        with _writing(folder), new_folder(folder) as temporary:
            JsonTokenizer(content, EOD_TOKEN).save(temporary)
    return load_tokenizer(folder)


def _entries(data: DataConfig) -> list[TextSource | Path]:
    """Text sources, and prefixes of token files, in the order of the config."""
    if data.path and data.source is not Source.files:
        raise InputError(
            f"{list(data.path)} would not be read: data.source={data.source.value}",
            fix="data=files, or no data.path",
            key="data.path",
        )
    if data.source is Source.stdlib:
        return [stdlib_source()]
    if data.source is Source.hub:
        return [hub_source(data.name, data.text_key)]
    return [token_prefix(path) or files_source(path, data.text_key) for path in data.path]


def _text_part(source: TextSource, tokenizer: Tokenizer, data: DataConfig) -> TokenPart:
    """The token files of a text source, written now or found in the cache."""
    key = _key(source.identity, _split_settings(data), tokenizer.fingerprint)
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(source.name).name).strip("-")[:40]
    folder = Path(data.cache) / f"{label}-{key}"
    if not folder.is_dir():
        with _writing(folder), new_folder(folder) as temporary:
            _tokenize(source, tokenizer, data, temporary)
    files = [open_token_file(folder / split) for split in (TRAIN, EVAL)]
    for file in files:
        if file.sidecar is None:
            raise InputError(f"{folder} is incomplete", fix="delete it and run again", key="data.cache")
        check_tokens(file, tokenizer.vocab_size, tokenizer.fingerprint)
    train, held_out = (TokenSpan(file.prefix, 0, len(file.tokens), file.documents) for file in files)
    text_bytes = sum(file.sidecar["text_bytes"] for file in files)
    fingerprint = _key(*(file.fingerprint for file in files))
    return TokenPart(source.name, train, held_out, text_bytes, fingerprint)


def _token_file_part(prefix: Path, tokenizer: Tokenizer, eval_fraction: float) -> TokenPart:
    """Token files made elsewhere: the last documents are held out, of a single document its end."""
    file = open_token_file(prefix)
    check_tokens(file, tokenizer.vocab_size, tokenizer.fingerprint)
    total = len(file.tokens)
    if file.documents == 1:
        held, boundary = 1, total - max(1, round(total * eval_fraction))
    else:
        held = min(file.documents - 1, max(1, round(file.documents * eval_fraction)))
        boundary = _first_token(file, file.documents - held)
    return TokenPart(
        name=str(prefix),
        train=TokenSpan(prefix, 0, boundary, max(1, file.documents - held)),
        eval=TokenSpan(prefix, boundary, total, held),
        text_bytes=None,
        fingerprint=file.fingerprint,
    )


def _first_token(file: TokenFile, document: int) -> int:
    """Place of a document's first token."""
    return int(file.lengths[: file.document_index[document]].sum(dtype=np.int64))


def _tokenize(source: TextSource, tokenizer: Tokenizer, data: DataConfig, folder: Path) -> None:
    """Write both splits of a source into ``folder``."""
    writers: dict[str, TokenWriter] = {}
    with PrepareProgress(source.name) as progress:
        for batch in _batches(_splits(source, data)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                if split not in writers:
                    writers[split] = TokenWriter(folder / split, tokenizer)
                writers[split].add(ids, len(text.encode("utf-8", errors="replace")))
            totals = ((writer.documents, writer.tokens, writer.text_bytes) for writer in writers.values())
            progress.update(*map(sum, zip(*totals, strict=True)))
    for writer in writers.values():
        writer.close(source.identity)


def _splits(source: TextSource, data: DataConfig) -> Iterator[tuple[str, str]]:
    """Documents of a source with their split; refuses text that cannot fill both splits."""
    found = set()
    for split, text in assign_splits(limit_bytes(source.documents(), data.max_bytes), data.eval_fraction):
        found.add(split)
        yield split, text
    if found != {TRAIN, EVAL}:
        raise InputError(
            f"{source.name} holds {'too little' if found else 'no'} text",
            fix="give text that can be split into a training and a held-out part",
            key="data.path" if data.source is Source.files else "data.source",
        )


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Groups of documents for the tokenizer, bounded in number and size."""
    batch, chars = [], 0
    for split, text in documents:
        batch.append((split, text))
        chars += len(text)
        if chars >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn failures of the file system (no space, no permission) into one message."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror or error}",
            fix="free some space or choose another folder",
            key="data.cache",
        ) from error


def _split_settings(data: DataConfig) -> dict[str, object]:
    return {"eval_fraction": data.eval_fraction, "max_bytes": data.max_bytes}


def _key(*parts: object) -> str:
    """A short hash of JSON-able values."""
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts], sort_keys=True).encode()).hexdigest()[:16]
