"""Files are written whole or not at all, by one process at a time."""

import os

import pytest

from data.files import locked, replacing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "x") as file:
        file.write(b"new")
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_errors_name_the_file_that_was_given(tmp_path):
    with pytest.raises(FileNotFoundError) as error, replacing(tmp_path / "none" / "x"):
        pass
    assert error.value.filename == str(tmp_path / "none" / "x")


def test_writing_follows_a_link_and_leaves_a_device_in_place(tmp_path):
    """As root, `--out /dev/null` replaced the device by a file."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("link", "device"):
        with replacing(tmp_path / name) as file:
            file.write(b"new")
    assert (tmp_path / "file").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert (tmp_path / "device").is_symlink() and not os.path.isfile("/dev/null")


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path):
    refused = pytest.raises(BlockingIOError, match="another process is writing it")
    with locked(tmp_path / "x"), refused, locked(tmp_path / "x"):
        pass
    with locked(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())
