"""The text an export is compared on."""

import pytest
import torch

from bitmoe.config.schema import Config
from bitmoe.convert.check_text import check_tokens
from bitmoe.data.bpe import train_bpe
from bitmoe.data.prepare import prepare
from bitmoe.data.tokenizer import ByteTokenizer, JsonTokenizer


@pytest.fixture
def config(tmp_path):
    config = Config()
    config.data.cache, config.data.max_bytes, config.context.seq_length = str(tmp_path / "cache"), 1 << 20, 100
    return config


def test_without_a_cache_docstrings_are_read_and_nothing_is_written(config, tmp_path):
    tokens_BS, name = check_tokens(config, ByteTokenizer(), 512)
    assert (tokens_BS.shape, tokens_BS.dtype) == ((5, 100), torch.int64)
    assert name == "docstrings of Python's standard library"
    assert "argparse" in ByteTokenizer().decode(tokens_BS.flatten().tolist())
    assert list(tmp_path.iterdir()) == []


def test_held_out_text_of_the_cache_is_read(config):
    held_out = prepare(config).parts[0].eval
    tokens_BS, name = check_tokens(config, ByteTokenizer(), 250)
    assert tokens_BS.shape == (2, 100)
    assert name == f"held-out text of {held_out.prefix.parent.name}"
    again, _ = check_tokens(config, ByteTokenizer(), 200)
    assert torch.equal(again, tokens_BS)


def test_tokens_of_another_tokenizer_are_not_read(config):
    prepare(config)
    other = JsonTokenizer(train_bpe(["def words of text " * 50], 300))
    tokens_BS, name = check_tokens(config, other, 200)
    assert name.startswith("docstrings")
    assert int(tokens_BS.max()) < other.vocab_size


@pytest.mark.parametrize(("count", "shape"), [(2, (1, 2)), (100, (1, 100)), (199, (1, 100)), (400_000, (4000, 100))])
def test_as_many_tokens_as_sequences_take(config, count, shape):
    assert check_tokens(config, ByteTokenizer(), count)[0].shape == shape
