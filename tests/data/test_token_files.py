"""Token files: every way a pair can be wrong is refused by name, before any token is used."""

import json

import numpy as np
import pytest

from bitmoe.config.errors import InputError
from bitmoe.data.token_files import check_tokens, open_token_file, path_of, token_prefix
from bitmoe.data.token_writer import TokenWriter
from bitmoe.data.tokenizer import ByteTokenizer

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]
IDX_BYTES = 34 + 12 * 3 + 8 * 4


class LargeTokenizer(ByteTokenizer):
    """Byte ids in a vocabulary that needs four bytes a token."""

    vocab_size = 70_000
    fingerprint = "f" * 64


def patch(file, offset, content):
    """Overwrite bytes of a file."""
    data = bytearray(file.read_bytes())
    data[offset : offset + len(content)] = content
    file.write_bytes(data)


def int64(value):
    return int(value).to_bytes(8, "little")


def write_documents(prefix, tokenizer, texts):
    writer = TokenWriter(prefix, tokenizer)
    for text in texts:
        writer.add(tokenizer.encode(text), len(text))
    writer.close({"kind": "test"})


@pytest.mark.parametrize(
    ("dtype", "code"), [(np.uint8, 1), (np.int16, 3), (np.int32, 4), (np.int64, 5), (np.uint16, 8)]
)
def test_open_token_file(write_pair, dtype, code):
    file = open_token_file(write_pair(DOCUMENTS, dtype=dtype, code=code))
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert file.tokens.dtype == dtype
    assert file.documents == 3
    assert file.lengths.tolist() == [3, 1, 4]
    assert file.sidecar is None


def test_open_token_file_keeps_dots_in_names(write_pair):
    assert open_token_file(write_pair(DOCUMENTS, name="wiki.v1.2")).documents == 3


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_open_token_file_names_the_missing_half(write_pair, ending):
    prefix = write_pair(DOCUMENTS)
    path_of(prefix, ending).unlink()
    with pytest.raises(InputError, match=rf"data.path: .*tokens\{ending} is missing"):
        open_token_file(prefix)


def test_open_token_file_refuses_a_truncated_bin(write_pair):
    prefix = write_pair(DOCUMENTS)
    path_of(prefix, ".bin").write_bytes(path_of(prefix, ".bin").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"tokens\.bin has 15 bytes, but tokens\.idx describes 16"):
        open_token_file(prefix)


@pytest.mark.parametrize("size", [0, 20, IDX_BYTES - 1, IDX_BYTES + 8])
def test_open_token_file_refuses_an_index_of_wrong_size(write_pair, size):
    prefix = write_pair(DOCUMENTS)
    data = path_of(prefix, ".idx").read_bytes()
    path_of(prefix, ".idx").write_bytes((data + bytes(8))[:size])
    with pytest.raises(InputError, match=rf"tokens\.idx has {size} bytes"):
        open_token_file(prefix)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"PK", "is not an index"),
        (9, int64(2), "has version 2, not 1"),
        (17, b"\x07", "has dtype code 7"),
        (17, b"\x63", "has dtype code 99"),
        (17, b"\x04", "pointers do not follow its lengths"),
        (34, b"\x05", "pointers do not follow its lengths"),
        (34, b"\xff\xff\xff\xff", "pointers do not follow its lengths"),
        (46, int64(2), "pointers do not follow its lengths"),
        (54, int64(10**15), "pointers do not follow its lengths"),
        (70, int64(1), "document index does not cover"),
        (78, int64(3), "document index does not cover"),
        (94, int64(2), "document index does not cover"),
    ],
)
def test_open_token_file_refuses_a_wrong_index(write_pair, offset, content, message):
    prefix = write_pair(DOCUMENTS)
    patch(path_of(prefix, ".idx"), offset, content)
    with pytest.raises(InputError, match=rf"tokens\.idx .*{message}"):
        open_token_file(prefix)


def test_open_token_file_refuses_pairs_that_disagree(write_pair):
    one, other = write_pair(DOCUMENTS, name="one"), write_pair(DOCUMENTS[:2], name="other")
    path_of(one, ".idx").write_bytes(path_of(other, ".idx").read_bytes())
    with pytest.raises(InputError, match=r"one\.bin has 16 bytes, but one\.idx describes 8"):
        open_token_file(one)


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_open_token_file_refuses_empty_files(write_pair, documents):
    with pytest.raises(InputError, match=r"tokens\.idx is empty"):
        open_token_file(write_pair(documents))


@pytest.mark.parametrize(("token", "dtype", "code"), [(259, np.uint16, 8), (-1, np.int32, 4)])
def test_check_tokens_refuses_ids_outside_the_vocabulary(write_pair, token, dtype, code):
    tokenizer = ByteTokenizer()
    file = open_token_file(write_pair([[1, token, 2]], dtype=dtype, code=code))
    with pytest.raises(InputError, match=rf"holds token id {token}, outside the vocabulary of 259"):
        check_tokens(file, tokenizer.vocab_size, tokenizer.fingerprint)
    check_tokens(open_token_file(write_pair([[0, 258]])), tokenizer.vocab_size, tokenizer.fingerprint)


def test_token_prefix(write_pair):
    prefix = write_pair(DOCUMENTS)
    assert {token_prefix(f"{prefix}{ending}") for ending in ("", ".bin", ".idx")} == {prefix}
    assert token_prefix(f"{prefix}.txt") is None
    prefix.mkdir()
    assert token_prefix(str(prefix)) is None


@pytest.mark.parametrize(("tokenizer", "dtype"), [(ByteTokenizer(), np.uint16), (LargeTokenizer(), np.int32)])
def test_token_writer_is_read_by_us_and_by_megatron(tmp_path, tokenizer, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    texts = ["one", "\u00e9", "three"]
    write_documents(tmp_path / "x", tokenizer, texts)
    expected = [[*tokenizer.encode(text), 256] for text in texts]

    ours = open_token_file(tmp_path / "x")
    assert ours.tokens.tolist() == sum(expected, [])
    assert ours.tokens.dtype == dtype
    check_tokens(ours, tokenizer.vocab_size, tokenizer.fingerprint)

    theirs = IndexedDataset(str(tmp_path / "x"))
    assert [document.tolist() for document in theirs] == expected
    assert theirs.document_indices.tolist() == ours.document_index.tolist()


def test_token_writer_is_read_by_gpt_dataset(tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class MegatronTokenizer(ByteTokenizer):
        eod, pad = ByteTokenizer.eod_id, ByteTokenizer.pad_id
        unique_identifiers = {"name": "bytes"}

    prefix = str(tmp_path / "x")
    write_documents(tmp_path / "x", ByteTokenizer(), [f"document {i}" for i in range(40)])
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=MegatronTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(low_level), dtype=np.int32)
    sample = GPTDataset(low_level, prefix, documents, 4, Split.train, config)[0]
    assert "document" in ByteTokenizer().decode(sample["tokens"].tolist())


def test_token_writer_refuses_ids_that_do_not_fit(tmp_path):
    writer = TokenWriter(tmp_path / "x", ByteTokenizer())
    for wrong in (259, 65_536, -1):
        with pytest.raises(InputError, match=f"returned id {wrong}, outside its vocabulary of 259"):
            writer.add(np.array([1, wrong]), 2)


def test_check_tokens_refuses_another_tokenizer(tmp_path):
    write_documents(tmp_path / "x", ByteTokenizer(), ["text"])
    file = open_token_file(tmp_path / "x")
    check_tokens(file, 259, ByteTokenizer.fingerprint)
    with pytest.raises(InputError, match=r"tokenizer.kind: .*x was made with another tokenizer"):
        check_tokens(file, 70_000, LargeTokenizer.fingerprint)


def test_open_token_file_refuses_a_foreign_sidecar(tmp_path):
    write_documents(tmp_path / "x", ByteTokenizer(), ["text"])
    sidecar = path_of(tmp_path / "x", ".tokens.json")
    noted = json.loads(sidecar.read_text())
    for wrong in ("no json", "[]", json.dumps(noted | {"bin_bytes": 3})):
        sidecar.write_text(wrong)
        with pytest.raises(InputError, match=r"x\.tokens\.json is damaged or describes another \.bin"):
            open_token_file(tmp_path / "x")
