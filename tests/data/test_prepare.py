"""Preparation: real text to token files, the cache, concurrent writers, interruption, refusals."""

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bitmoe.config.choices import Source, TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config
from bitmoe.data import prepare as prepare_module
from bitmoe.data.prepare import prepare
from bitmoe.data.summary import print_summary
from bitmoe.data.token_files import open_token_file, path_of
from bitmoe.data.tokenizer import ByteTokenizer

TEXTS = [f"text number {i} " * (i % 7 + 1) for i in range(100)]


@pytest.fixture
def rows(tmp_path):
    """A JSON-lines file of ``TEXTS``."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def documents(span):
    """Texts of a span, by its end-of-document tokens."""
    tokens = open_token_file(span.prefix).tokens[span.start : span.stop]
    pieces = np.split(tokens, np.flatnonzero(tokens == ByteTokenizer.eod_id) + 1)
    assert len(pieces.pop()) == 0
    return [ByteTokenizer().decode(piece.tolist()) for piece in pieces]


def cache_folders(config):
    cache = Path(config.data.cache)
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


def test_prepare_keeps_every_document(rows, files_config):
    data = prepare(files_config(rows, eval_fraction=0.1))
    (part,) = data.parts
    train, held_out = documents(part.train), documents(part.eval)
    assert sorted(train + held_out) == sorted(TEXTS)
    assert len(held_out) == part.eval.documents > 1
    assert train == [text for text in TEXTS if text not in held_out]
    assert data.documents == 100
    assert part.text_bytes == sum(map(len, TEXTS)) == data.train_tokens + data.eval_tokens - 100


def test_prepare_reuses_the_cache(rows, files_config, monkeypatch):
    config = files_config(rows)
    first = prepare(config)
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "_tokenize", lambda *_: pytest.fail("tokenized again"))
        assert prepare(config).fingerprint == first.fingerprint
    config.data.eval_fraction = 0.3
    changed = prepare(config)
    assert changed.fingerprint != first.fingerprint
    rows.write_text(json.dumps({"text": "other"}) + "\n" + json.dumps({"text": "text"}))
    assert prepare(config).documents == 2
    assert len(cache_folders(config)) == 3


def test_prepare_refuses_a_damaged_cache(rows, files_config):
    config = files_config(rows)
    bin_path = path_of(prepare(config).parts[0].train.prefix, ".bin")
    bin_path.write_bytes(bin_path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train\.bin has \d+ bytes"):
        prepare(config)
    path_of(bin_path.parent / "eval", ".tokens.json").unlink()
    bin_path.write_bytes(bin_path.read_bytes() + bytes(2))
    with pytest.raises(InputError, match=r"data.cache: .* is incomplete"):
        prepare(config)


def test_prepare_interrupted_leaves_nothing(rows, files_config, monkeypatch):
    config = files_config(rows)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.TokenWriter, "close", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert cache_folders(config) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_prepare_names_a_cache_it_cannot_write(rows, files_config, monkeypatch, code):
    config = files_config(rows)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(prepare_module.TokenWriter, "close", fail)
    with pytest.raises(InputError, match=rf"data.cache: cannot write .*: {os.strerror(code)}"):
        prepare(config)
    assert cache_folders(config) == []


def test_prepare_while_another_process_prepares(rows, files_config, monkeypatch):
    config = files_config(rows)
    close, inner = prepare_module.TokenWriter.close, []

    def close_late(*arguments):
        # All tokens are written, nothing is renamed: now somebody else prepares the same text.
        if not inner:
            inner.append(None)
            inner.append(prepare(config).fingerprint)
        close(*arguments)

    monkeypatch.setattr(prepare_module.TokenWriter, "close", close_late)
    outer = prepare(config)
    assert inner[1] == outer.fingerprint
    assert len(cache_folders(config)) == 1
    assert len(documents(outer.parts[0].train)) == outer.parts[0].train.documents


def test_prepare_trains_bpe_on_the_training_text(tmp_path, files_config):
    # One document of two is held out, the last: its word must not become a token.
    (tmp_path / "a.txt").write_text("common words here " * 200)
    (tmp_path / "b.txt").write_text("zyzzyva " * 500)
    config = files_config(tmp_path / "*.txt")
    config.tokenizer.kind, config.tokenizer.vocab_size = TokenizerKind.bpe, 300
    data = prepare(config)
    assert len(data.tokenizer.encode("common")) == 1
    assert len(data.tokenizer.encode("zyzzyva")) > 3
    assert prepare(config).tokenizer.fingerprint == data.tokenizer.fingerprint
    assert len(cache_folders(config)) == 2
    assert data.train_tokens < data.parts[0].text_bytes / 4


def test_prepare_bpe_needs_text(write_pair, files_config):
    config = files_config(write_pair([[1, 2], [3, 4]]))
    config.tokenizer.kind = TokenizerKind.bpe
    with pytest.raises(InputError, match="tokenizer.kind: kind=bpe is trained on text"):
        prepare(config)


def test_prepare_uses_token_files_as_they_are(write_pair, files_config):
    prefix = write_pair([[i] * (i + 1) for i in range(10)])
    config = files_config(f"{prefix}.bin", eval_fraction=0.2)
    (part,) = prepare(config).parts
    assert (part.train.start, part.train.stop, part.train.documents) == (0, 36, 8)
    assert (part.eval.start, part.eval.stop, part.eval.documents) == (36, 55, 2)
    assert cache_folders(config) == []


def test_prepare_holds_out_the_end_of_a_single_document(write_pair, files_config):
    (part,) = prepare(files_config(write_pair([[7] * 200]), eval_fraction=0.1)).parts
    assert (part.train.stop, part.eval.start, part.eval.stop) == (180, 180, 200)


def test_prepare_checks_token_files_against_the_tokenizer(write_pair, rows, files_config):
    with pytest.raises(InputError, match=r"holds token id 400, outside the vocabulary of 259"):
        prepare(files_config(write_pair([[1], [400]])))
    # Our own files, given by prefix, know their tokenizer.
    config = files_config(rows)
    made = prepare(config).parts[0].train.prefix
    other = files_config(rows, made)
    other.tokenizer.kind, other.tokenizer.vocab_size = TokenizerKind.bpe, 300
    with pytest.raises(InputError, match="was made with another tokenizer"):
        prepare(other)


def test_prepare_mixes_paths_with_weights(write_pair, rows, files_config):
    config = files_config(rows, write_pair([[1] * 50, [2] * 50]), weights=[0.3, 0.7])
    data = prepare(config)
    assert data.weights == (0.3, 0.7)
    assert [part.text_bytes is None for part in data.parts] == [False, True]


def test_prepare_max_bytes(rows, files_config):
    data = prepare(files_config(rows, max_bytes=500))
    assert data.parts[0].text_bytes == 500


@pytest.mark.parametrize(("content", "message"), [("", "holds no text"), ("a", "holds too little text")])
def test_prepare_refuses_empty_text(tmp_path, files_config, content, message):
    file = tmp_path / "nothing.txt"
    file.write_text(content)
    config = files_config(file)
    with pytest.raises(InputError, match=rf"data.path: .*nothing\.txt {message}"):
        prepare(config)
    assert cache_folders(config) == []


def test_prepare_refuses_a_path_it_would_not_read(rows, files_config):
    config = files_config(rows)
    config.data.source = Source.stdlib
    with pytest.raises(InputError, match=r"data.path: .*rows\.jsonl.* would not be read"):
        prepare(config)


def test_prepare_stdlib_and_summary(tmp_path):
    config = Config()
    config.data.cache, config.data.max_bytes = str(tmp_path), 300_000
    data = prepare(config)
    assert data.parts[0].name == "stdlib"
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(data, console)
    shown = console.export_text()
    assert f"{data.train_tokens:,}" in shown
    assert str(data.parts[0].train.prefix.parent) in shown
