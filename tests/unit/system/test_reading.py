"""A pipe, a device or a loop of links where a file is expected is refused at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune.system.reading import open_file, read_bytes, read_text


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL = [(a_pipe, "a pipe"), (a_device, "a device"), (a_loop, "symbolic links"), (Path.mkdir, "directory")]


@pytest.mark.parametrize(("make", "reason"), SPECIAL, ids=lambda value: getattr(value, "__name__", None))
def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    make(tmp_path / "it")
    with pytest.raises(OSError, match=reason) as caught:
        read_bytes(tmp_path / "it")
    assert caught.value.filename == str(tmp_path / "it")


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one\r\ntwo")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"one\r\ntwo"
    assert read_text(tmp_path / "link") == "one\ntwo"
    with open_file(tmp_path / "link") as stream:
        assert stream.readline() == b"one\r\n"
