"""Shards that are written are read back; an index or a file that is not what it should be is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bitmoe.config.errors import InputError
from bitmoe.train.safetensors_shards import INDEX, SINGLE, Shards, write_shards

TENSORS = {"a": torch.arange(6.0).view(3, 2), "b": torch.ones(2, dtype=torch.uint8), "c": torch.zeros(4).bfloat16()}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, [[("a", TENSORS["a"])], [("b", TENSORS["b"]), ("c", TENSORS["c"])]], lambda name: None)
    return tmp_path


def test_what_is_written_is_read(folder):
    shards = Shards(folder)
    assert {name: stored.file for name, stored in shards.stored.items()} == {"a": FIRST, "b": SECOND, "c": SECOND}
    assert shards.stored["c"] == (SECOND, "BF16", (4,))
    for name, tensor in TENSORS.items():
        assert torch.equal(shards.read(name), tensor)
    assert torch.equal(shards.read("a", row=1), TENSORS["a"][1])


def test_one_file_without_an_index(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    assert torch.equal(Shards(tmp_path).read("a"), TENSORS["a"])


def test_views_of_one_tensor_can_be_written(tmp_path):
    both = torch.arange(12.0).view(2, 6)
    write_shards(tmp_path, [[("first", both[0]), ("second", both[1]), ("column", both[:, 0])]], lambda name: None)
    shards = Shards(tmp_path)
    assert [shards.read(name).tolist() for name in ("second", "column")] == [both[1].tolist(), [0.0, 6.0]]


def refused(folder, *reasons):
    with pytest.raises(InputError) as caught:
        Shards(folder)
    assert all(reason in str(caught.value) for reason in reasons), str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/tmp/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "x\0.safetensors",
        "x.bin",
        "\\x",
        3,
        None,
    ],
)
def test_index_that_leaves_the_folder_is_refused(folder, name):
    index = {"weight_map": {"a": FIRST, "b": name}}
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX, "b is said to be in", repr(name))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100000], ids=lambda text: text[:8])
def test_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


@pytest.mark.parametrize(
    ("weight_map", "name"),
    [
        ({"a": FIRST, "b": SECOND}, "c"),
        ({"a": FIRST, "b": SECOND, "c": SECOND, "d": FIRST}, "d"),
        ({"a": SECOND, "b": SECOND, "c": FIRST}, "a"),
    ],
)
def test_index_that_does_not_fit_the_files_is_refused(folder, weight_map, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, INDEX, f"{name} is listed")


def test_missing_shard_is_refused(folder):
    (folder / SECOND).unlink()
    refused(folder, SECOND)


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_truncated_file_is_refused(folder, size):
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:size])
    refused(folder, SECOND, "damaged")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!doctype html><html></html>", "web page"),
        (b"\x80\x04K\x01.", "pickle"),
        (b"PK\x03\x04 and so on", "pickle"),
    ],
)
def test_something_else_in_place_of_a_shard_is_refused(folder, content, reason):
    (folder / SECOND).write_bytes(content)
    refused(folder, SECOND, reason)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_refused_when_it_is_read(tmp_path, value):
    save_file({"a": torch.tensor([1.0, value]), "b": torch.ones(1)}, tmp_path / SINGLE)
    shards = Shards(tmp_path)
    shards.read("b")
    with pytest.raises(InputError, match="model.safetensors: a holds NaN"):
        shards.read("a")


def test_no_tensors_at_all_is_refused(tmp_path):
    refused(tmp_path, SINGLE, INDEX)
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "pytorch_model.bin", "pickles can run code")
