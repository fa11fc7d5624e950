"""Text sources: what is read, in which order, and what is refused."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from bitmoe.config.errors import InputError
from bitmoe.data import text
from bitmoe.data.text import files_source, hub_source, limit_bytes, stdlib_source


def write_rows(file, *texts, key="text"):
    lines = "".join(json.dumps({key: row}) + "\n" for row in texts)
    file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
    return str(file)


def read(path, **options):
    return list(files_source(str(path), **options).documents())


def test_stdlib_source_is_the_library_without_tests():
    source = stdlib_source()
    documents = list(source.documents())
    with open(os.__file__, encoding="utf-8") as stream:
        assert stream.read() in documents
    size = sum(map(len, documents))
    assert 5e6 < size < 30e6
    assert not any("class BaseTestCase(unittest" in document for document in documents)
    assert stdlib_source().identity == source.identity
    assert list(source.documents()) == documents


def test_files_source_plain_text_is_kept_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\xc3\xa9")
    assert read(tmp_path / "a.txt") == ["one\r\ntwo\n\u00e9"]


def test_files_source_cuts_long_text(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DOCUMENT_CHARS", 4)
    (tmp_path / "a.txt").write_text("0123456789")
    assert read(tmp_path / "a.txt") == ["0123", "4567", "89"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_files_source_json_lines(tmp_path, name):
    assert read(write_rows(tmp_path / name, "one", "", None, "two")) == ["one", "two"]


def test_files_source_json_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert read(tmp_path / "a.json") == ["one", "two"]


def test_files_source_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_key="body") == ["one", "two"]


def test_files_source_folder_is_sorted_and_recursive(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    write_rows(tmp_path / "d.jsonl", "third")
    (tmp_path / "empty.jsonl").touch()
    assert read(tmp_path) == ["first", "second", "third"]


def test_files_source_glob(tmp_path):
    for name in ("b.py", "a.py", "c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "**" / "*.py") == ["a.py", "b.py"]


def test_files_source_identity_follows_the_content(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = files_source(str(file)).identity
    assert files_source(str(file)).identity == first
    file.write_text("other")
    assert files_source(str(file)).identity != first


def test_files_source_names_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"data.path: .*nowhere\.txt does not exist"):
        files_source(str(tmp_path / "nowhere.txt"))
    with pytest.raises(InputError, match=r"data.path: the folder .* holds no text"):
        files_source(str(tmp_path))


def test_files_source_names_unreadable_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": broken\n')
    with pytest.raises(InputError, match=r"cannot read .*a\.jsonl"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        read(tmp_path / "a.parquet")


def test_files_source_names_a_wrong_column(tmp_path):
    with pytest.raises(InputError, match=r"data.text_key: .* has no column 'text'; it has content"):
        read(write_rows(tmp_path / "a.jsonl", "one", key="content"))
    with pytest.raises(InputError, match=r"data.text_key: column 'text' .* holds 3, not text"):
        read(write_rows(tmp_path / "b.jsonl", 3))


def test_hub_source_names_an_unreachable_dataset():
    # conftest.py puts the hub client offline.
    with pytest.raises(InputError, match=r"data.name: cannot read nobody/nothing:en"):
        list(hub_source("nobody/nothing:en").documents())


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, ["ab", "\u00e9\u00e9", "c"]),
        (7, ["ab", "\u00e9\u00e9", "c"]),
        (5, ["ab", "\u00e9"]),
        (2, ["ab"]),
    ],
)
def test_limit_bytes_cuts_between_characters(limit, expected):
    assert list(limit_bytes(["ab", "\u00e9\u00e9", "c"], limit)) == expected
