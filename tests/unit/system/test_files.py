"""Whole or absent, under whatever ends the writer; and names from strangers' files stay in their folder."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune.errors import DownloadError, InputError
from cogtune.system import files
from cogtune.system.names import inside

WRITERS: list[Callable[[Path], None]] = [
    lambda path: files.write_bytes(path, b"new"),
    lambda path: files.write_text(path, "new"),
    lambda path: files.write_json(path, "new", durable=True),
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "a").write_text("old")
    write(tmp_path / "a")
    assert (tmp_path / "a").read_text().strip().strip('"') == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], fault: BaseException
) -> None:
    (tmp_path / "a").write_text("old")

    def half(path: Path, content: bytes) -> None:
        path.write_bytes(content[:1])
        raise fault

    monkeypatch.setattr(files, "write_file", half)
    with pytest.raises(type(fault)):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_two_writers_of_one_file_never_see_each_others_half(tmp_path: Path) -> None:
    with files.growing(tmp_path / "a") as first, files.growing(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "1", "the block that ends last"


def test_permissions_are_the_umasks_or_those_that_are_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "")
        files.write_bytes(tmp_path / "b", b"", mode=0o664)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o640, 0o664]


def test_a_link_is_replaced_and_what_it_names_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run.json").symlink_to("mine")
    files.write_text(tmp_path / "run.json", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "run.json").is_symlink()


def test_a_device_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    files.write_text(tmp_path / "pipe", "through")
    assert reader.communicate(timeout=20)[0] == b"through"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("name", ["x" * 255, "模" * 85, "odd*[1]?.json"])
def test_any_name_that_a_file_may_have_can_be_written(tmp_path: Path, name: str) -> None:
    files.write_json(tmp_path / name, 1)
    with files.growing_folder(tmp_path / (name[:-1] + "d"), durable=True) as folder:
        (folder / "a").touch()
    assert len(names(tmp_path)) == 2


def test_what_a_killed_writer_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from cogtune.system import files
with files.growing(Path({str(tmp_path / "a.json")!r})) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = tmp_path.iterdir()
    files.write_json(tmp_path / "a.json", 1)
    assert left.exists(), "a writer of another container may be behind it"
    long_ago = time.time() - 600
    os.utime(left, (long_ago, long_ago))
    (tmp_path / ".a.json.mine.partial").write_text("no writer of ours names files like this")
    os.utime(tmp_path / ".a.json.mine.partial", (0, 0))
    files.write_json(tmp_path / "a.json", 2)
    assert names(tmp_path) == [".a.json.mine.partial", "a.json"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "a"
    (tmp_path / ".a.partial" / "left").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="not made by cogtune"), files.growing_folder(place):
        pytest.fail("it is somebody else's")
    (tmp_path / ".a.partial" / files.MARK).touch()  # what a killed one has
    with files.growing_folder(place, durable=True) as folder:
        (folder / "b").write_text("1")
        assert not place.exists()
    assert (names(tmp_path), names(place)) == (["a"], ["b"])
    with pytest.raises(OSError, match="not empty"), files.growing_folder(place) as folder:
        (folder / "c").touch()
    with pytest.raises(KeyError), files.growing_folder(place, replace=True):
        raise KeyError
    assert (names(tmp_path), names(place)) == (["a"], ["b"])
    with files.growing_folder(place, replace=True) as folder:
        (folder / "c").touch()
    assert (names(tmp_path), names(place)) == (["a"], ["c"])


def test_json_is_readable_and_in_utf8(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"模型": 1})
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{\n "模型": 1\n}\n'
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"模型": 1}


GOOD = ["model-00001-of-00008.safetensors", "a b.json", "图.png", "x" * 255, ".gitattributes", "..a", "console.txt"]
BAD = {
    "../a": "folder", "/etc/passwd": "absolute", "a/b": "folder", "": "empty", ".": "empty", "..": "outside",
    "C:\\a": "absolute", "a\\b": "character", "a\0b": "character", "a\nb": "character", "\x1b[2J": "character",
    "x" * 256: "longer", "模" * 86: "longer", "\ud800": "Unicode", "NUL": "reserved", "aux.json": "reserved",
    ".a.partial": "reserved", ".cogtune.lock": "reserved",
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_plain_names_are_taken(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name, named_by="index.json") == tmp_path / name


@pytest.mark.parametrize(("name", "says"), BAD.items())
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        inside(tmp_path, name, named_by="index.json")
    assert caught.value.code == "unsafe-name"
    assert "index.json" in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", [None, 7, ["a"], {"a": 1}])
def test_a_name_of_another_type_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(InputError, match="is not a text"):
        inside(tmp_path, name, named_by="index.json")  # type: ignore[arg-type]


def test_names_may_lie_in_folders_where_that_is_said(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b/c.json", named_by="list", nested=True) == tmp_path / "a/b/c.json"
    for name in ("a/../../b", "/a", "a//b", "a/", "a/./b", "a/..", f"a/{'x' * 256}"):
        with pytest.raises(DownloadError):
            inside(tmp_path, name, named_by="list", nested=True, error=DownloadError)


def test_a_name_that_goes_through_a_link_is_refused(tmp_path: Path) -> None:
    """The folder itself may be a link: that is its owner's choice."""
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "link").symlink_to(tmp_path / "elsewhere")
    folder = tmp_path / "folder"
    assert inside(folder, "sub/a", named_by="list", nested=True) == folder / "sub/a"
    with pytest.raises(InputError, match="a link"):
        inside(folder, "link/a", named_by="list", nested=True)
