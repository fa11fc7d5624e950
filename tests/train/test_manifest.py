"""A manifest proves a checkpoint whole: every kind of damage is refused with the file's name."""

import json
import random

import pytest

from bitmoe.config.errors import InputError
from bitmoe.train import manifest
from bitmoe.train.manifest import MANIFEST, SCHEMA, verify, write_manifest

CONTENT = {"step": 3, "state": {"step": 3, "lr": 0.125, "name": "run"}}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    for name, size in (("__0_0.distcp", 400), (".metadata", 90), ("empty", 0)):
        (folder / name).write_bytes(random.Random(name).randbytes(size))
    write_manifest(folder, CONTENT)
    return folder


def refusal(folder):
    with pytest.raises(InputError) as caught:
        verify(folder)
    return caught.value.what


def test_verify_returns_what_was_written(checkpoint):
    found = verify(checkpoint)
    assert found["schema"] == SCHEMA
    assert {key: found[key] for key in CONTENT} == CONTENT
    assert found["files"]["__0_0.distcp"]["bytes"] == 400
    assert set(found["files"]) == {"__0_0.distcp", ".metadata", "empty"}


@pytest.mark.parametrize("length", [399, 200, 0, 401])
def test_verify_refuses_another_length(checkpoint, length):
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(path.read_bytes().ljust(401, b"x")[:length])
    assert "__0_0.distcp" in refusal(checkpoint)
    assert str(length) in refusal(checkpoint)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", MANIFEST])
def test_verify_refuses_any_flipped_bit(checkpoint, name):
    path, intact = checkpoint / name, verify(checkpoint)
    whole = path.read_bytes()
    draw = random.Random(name)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert name in refusal(checkpoint)
    path.write_bytes(whole)
    assert verify(checkpoint) == intact


@pytest.mark.parametrize("name", ["__0_0.distcp", "empty", MANIFEST])
def test_verify_refuses_a_missing_file(checkpoint, name):
    (checkpoint / name).unlink()
    assert name in refusal(checkpoint)


def test_verify_refuses_an_extra_file(checkpoint):
    (checkpoint / "common.pt").write_bytes(b"a pickle, perhaps")
    assert "common.pt" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00\x01", '{"files": {}}'])
def test_verify_refuses_a_garbage_manifest(checkpoint, text):
    (checkpoint / MANIFEST).write_text(text)
    assert MANIFEST in refusal(checkpoint)


def test_verify_refuses_a_newer_schema(checkpoint, monkeypatch):
    (checkpoint / MANIFEST).unlink()
    monkeypatch.setattr(manifest, "SCHEMA", SCHEMA + 1)
    write_manifest(checkpoint, CONTENT)
    monkeypatch.undo()
    assert f"schema {SCHEMA + 1}" in refusal(checkpoint)


def test_verify_refuses_an_edited_state(checkpoint):
    path = checkpoint / MANIFEST
    body = json.loads(path.read_bytes())
    body["state"]["step"] = 4
    path.write_text(json.dumps(body))
    assert "changed after it was written" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["", MANIFEST, ".metadata"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_verify_refuses_what_others_may_write(checkpoint, name, mode):
    path = checkpoint / name
    path.chmod(path.stat().st_mode | mode)
    assert str(path) in refusal(checkpoint)


def test_verify_refuses_another_owner(checkpoint, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: checkpoint.stat().st_uid + 1)
    assert "another user" in refusal(checkpoint)


def test_verify_refuses_a_link(checkpoint, tmp_path):
    path = checkpoint / ".metadata"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert ".metadata" in refusal(checkpoint)


def test_write_manifest_keeps_others_out(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"1234")
    file.chmod(0o666)
    tmp_path.chmod(0o777)
    write_manifest(tmp_path, CONTENT)
    assert verify(tmp_path)["step"] == 3
    assert file.stat().st_mode & 0o777 == 0o644
