"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from yolov4_fast.files import replacing


def test_written_and_nothing_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("one", "two"):
        with replacing(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_writing_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError) as full, replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(path))
    path.mkdir()
    (path / "inside").touch()
    with pytest.raises(IsADirectoryError) as folder, replacing(path):
        pass
    assert folder.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_another_file_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, replacing(tmp_path / "file"):
        (tmp_path / "source").read_bytes()
    assert error.value.filename == str(tmp_path / "source")


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    usual, path = tmp_path / "usual", tmp_path / "file"
    usual.touch()
    with replacing(path) as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert path.stat().st_mode == usual.stat().st_mode
