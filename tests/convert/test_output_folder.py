"""A converted model appears whole or not at all, whatever ends the conversion."""

import os
import signal

import pytest

from bitmoe.config.errors import InputError
from bitmoe.convert.output_folder import output_folder


def test_folder_appears_with_its_name_at_the_end(tmp_path):
    out = tmp_path / "new" / "model"
    with output_folder(out, 1) as folder:
        (folder / "weights").write_bytes(b"1")
        (folder / "weights").chmod(0o600)
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert (out / "weights").read_bytes() == b"1"
    assert (out / "weights").stat().st_mode & 0o777 == out.stat().st_mode & 0o644


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt(), ZeroDivisionError()])
def test_failure_leaves_nothing(tmp_path, error):
    def fail():
        with output_folder(tmp_path / "model", 1) as folder:
            (folder / "weights").write_bytes(b"1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_removed(tmp_path):
    killed = os.fork()
    if not killed:
        with output_folder(tmp_path / "model", 1) as folder:
            (folder / "weights").write_bytes(b"1")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    assert not (tmp_path / "model").exists()
    assert len(list(tmp_path.iterdir())) == 1
    with output_folder(tmp_path / "model", 1) as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_conversions_to_one_place_are_refused(tmp_path):
    with output_folder(tmp_path / "model", 1) as folder:
        (folder / "weights").write_bytes(b"1")
        with pytest.raises(InputError, match="another conversion"), output_folder(tmp_path / "model", 1):
            pass
    assert (tmp_path / "model" / "weights").read_bytes() == b"1"


def test_folder_that_appeared_meanwhile_is_kept(tmp_path):
    with pytest.raises(InputError, match="appeared meanwhile"), output_folder(tmp_path / "model", 1):
        (tmp_path / "model").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_full_disk_is_one_message(tmp_path):
    with pytest.raises(InputError, match="GiB free"), output_folder(tmp_path / "model", 1 << 60):
        pass
    with (
        pytest.raises(InputError, match="No space left"),
        output_folder(tmp_path / "model", 1),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"1")
    assert list(tmp_path.iterdir()) == []
