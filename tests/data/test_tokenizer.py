"""Tokenizers: ids, round trips, fingerprints, saving, refusals."""

import json
import random

import numpy as np
import pytest

from bitmoe.config.choices import TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.config.schema import TokenizerConfig
from bitmoe.data.bpe import EOD_TOKEN, train_bpe
from bitmoe.data.tokenizer import ByteTokenizer, JsonTokenizer, build_tokenizer, load_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "the cat sat on the mat " * 30]


def random_text(seed, length=500):
    """Characters of the whole of Unicode but surrogates, which are no characters."""
    chosen = random.Random(seed)
    allowed = [*range(0xD800), *range(0xE000, 0x110000)]
    return "".join(map(chr, chosen.choices(allowed, k=length)))


@pytest.fixture(scope="module")
def bpe():
    return JsonTokenizer(train_bpe(TEXTS, 300))


def test_byte_tokenizer_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("A\u00e9").tolist() == [65, 0xC3, 0xA9]
    assert tokenizer.encode("").dtype == np.int64
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (259, 256)


@pytest.mark.parametrize("seed", range(3))
def test_byte_tokenizer_round_trip(seed):
    tokenizer, text = ByteTokenizer(), random_text(seed)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_tokenizer_decodes_anything():
    assert ByteTokenizer().decode([0xC3, 65, 256, 257, 258, 300, -1]) == "\ufffdA"


def test_byte_tokenizer_replaces_lone_surrogates():
    assert ByteTokenizer().encode("a\ud800b").tolist() == [97, 63, 98]


@pytest.mark.parametrize("seed", range(3))
def test_bpe_round_trip(bpe, seed):
    text = random_text(seed)
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_learns_the_text(bpe):
    assert len(bpe.encode(TEXTS[1])) < len(TEXTS[1]) / 3
    assert 257 < bpe.vocab_size <= 300
    ids = np.concatenate(bpe.encode_batch([*TEXTS, random_text(0)]))
    assert 0 <= ids.min() <= ids.max() < bpe.vocab_size


def test_bpe_is_deterministic():
    assert train_bpe(TEXTS, 280) == train_bpe(TEXTS, 280)


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(InputError, match=r"tokenizer.vocab_size: 256 tokens"):
        train_bpe(TEXTS, 256)


def test_special_tokens_in_text_are_text(bpe):
    ids = bpe.encode(f"a{EOD_TOKEN}b")
    assert bpe.eod_id not in ids
    assert bpe.decode(ids) == f"a{EOD_TOKEN}b"
    assert bpe.decode([bpe.eod_id]) == ""


def test_json_tokenizer_ignores_truncation_and_padding(bpe):
    from tokenizers import Tokenizer

    inner = Tokenizer.from_str(train_bpe(TEXTS, 300))
    inner.enable_truncation(4)
    inner.enable_padding(length=100)
    assert np.array_equal(JsonTokenizer(inner.to_str()).encode(TEXTS[0]), bpe.encode(TEXTS[0]))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_save_and_load(kind, bpe, tmp_path):
    tokenizer = ByteTokenizer() if kind == "byte" else bpe
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.fingerprint, loaded.eod_id) == (tokenizer.fingerprint, tokenizer.eod_id)
    assert np.array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_fingerprints_differ(bpe):
    content = train_bpe(TEXTS, 300)
    with_other_eod = JsonTokenizer(content, eod_token="a")
    assert len({ByteTokenizer().fingerprint, bpe.fingerprint, with_other_eod.fingerprint}) == 3


def test_build_tokenizer_from_file(bpe, tmp_path):
    bpe.save(tmp_path)
    config = TokenizerConfig(kind=TokenizerKind.file, path=str(tmp_path / "tokenizer.json"))
    assert build_tokenizer(config).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("content", ["{}", "no json", '{"model": 1}'])
def test_build_tokenizer_refuses_other_files(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(InputError, match="is not a tokenizer.json"):
        build_tokenizer(TokenizerConfig(kind=TokenizerKind.file, path=str(file)))


def test_build_tokenizer_names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json"):
        build_tokenizer(TokenizerConfig(kind=TokenizerKind.file, path=str(tmp_path / "nowhere.json")))


def test_json_tokenizer_needs_an_end_of_document():
    content = json.loads(train_bpe(TEXTS, 300).replace(EOD_TOKEN, "<|stop|>"))
    with pytest.raises(InputError, match="has no end-of-document token"):
        JsonTokenizer(json.dumps(content))
    assert JsonTokenizer(json.dumps(content), eod_token="<|stop|>").eod_id == 0


def test_load_tokenizer_refuses_a_damaged_folder(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_kind.json").write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(tmp_path)
