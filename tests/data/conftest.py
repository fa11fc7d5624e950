"""Token files and token data made by hand, and a configuration that writes into the test's folder."""

import numpy as np
import pytest

from bitmoe.config.choices import Source
from bitmoe.config.schema import Config
from bitmoe.data.token_data import TokenData, TokenPart, TokenSpan
from bitmoe.data.token_files import HEADER, MAGIC, path_of
from bitmoe.data.tokenizer import ByteTokenizer


@pytest.fixture
def write_pair(tmp_path):
    """Write documents (lists of ids) as a pair named ``name`` and return its prefix."""

    def write(documents, name="tokens", dtype=np.uint16, code=8):
        prefix = tmp_path / name
        lengths = np.array([len(document) for document in documents], dtype="<i4")
        pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
        index = np.arange(len(documents) + 1, dtype="<i8")
        path_of(prefix, ".bin").write_bytes(np.concatenate([[], *documents]).astype(dtype).tobytes())
        header = HEADER.pack(MAGIC, 1, code, len(documents), len(index))
        path_of(prefix, ".idx").write_bytes(header + b"".join(a.tobytes() for a in (lengths, pointers, index)))
        return prefix

    return write


@pytest.fixture
def token_data(write_pair):
    """Token data of parts with the given numbers of tokens; each part counts up from its own first id."""

    def make(sizes, weights=None, eval_size=41):
        parts = []
        for number, size in enumerate(sizes):
            prefix = write_pair([np.arange(size + eval_size) + 1000 * number], name=f"part{number}")
            train = TokenSpan(prefix, 0, size, 1)
            held_out = TokenSpan(prefix, size, size + eval_size, 1)
            parts.append(TokenPart(prefix.name, train, held_out, None, str(number)))
        return TokenData(tuple(parts), weights, ByteTokenizer())

    return make


@pytest.fixture
def files_config(tmp_path):
    """A configuration that reads the given paths and keeps its cache in the test's folder."""

    def make(*paths, **data):
        config = Config()
        config.data.source = Source.files
        config.data.path = [str(path) for path in paths]
        config.data.cache = str(tmp_path / "cache")
        for key, value in data.items():
            setattr(config.data, key, value)
        return config

    return make
