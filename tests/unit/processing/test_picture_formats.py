"""Which files are opened: formats that are decoded in this process, told by content."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from cogtune.data.picture_headers import check_picture
from cogtune.data.problems import BadRecordError
from cogtune.errors import DataError
from cogtune.processing.image import read_image
from cogtune.processing.picture_formats import FORMATS, known_formats
from cogtune.serve.pictures import PictureLimits, open_pictures
from cogtune.serve.refusals import Refusal

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(hello) print\nshowpage\n%%EOF\n"


def _every_way_of_opening(path: Path) -> list[str]:
    """What check, reading for training and answers, and the server say of a file."""
    import base64

    told = []
    with pytest.raises(BadRecordError) as checked:
        check_picture(path, None)
    told.append(str(checked.value))
    for limit in (None, 10**9):
        with pytest.raises(DataError) as read:
            read_image(path, max_pixels=limit)
        assert read.value.code == "image-unreadable"
        told.append(str(read.value))
    with pytest.raises(Refusal) as served:
        open_pictures([f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"], PictureLimits())
    return [*told, served.value.message]


def test_a_postscript_file_called_jpg_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand it to Ghostscript, which runs it."""
    programs, started = tmp_path / "bin", tmp_path / "started"
    programs.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {started}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    picture = tmp_path / "a.jpg"
    picture.write_bytes(EPS)
    assert all("format EPS" in text for text in _every_way_of_opening(picture))
    assert not started.exists()


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_containers_that_decode_while_they_are_opened_are_refused(kind: str, tmp_path: Path) -> None:
    picture = tmp_path / "icon.png"
    Image.new("RGB", (64, 64)).save(picture, kind)
    assert all(f"format {kind}" in text for text in _every_way_of_opening(picture))


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_of_the_list_are_read(kind: str, tmp_path: Path) -> None:
    if kind not in known_formats() or (kind in ("AVIF", "JPEG2000", "WEBP", "QOI") and not _can_write(kind)):
        pytest.skip(f"this Pillow has no {kind}")
    picture = tmp_path / "picture.dat"
    Image.new("RGB", (8, 6), (200, 30, 30)).save(picture, kind)
    assert read_image(picture).size == (8, 6)
    assert check_picture(picture, None).size == picture.stat().st_size


def _can_write(kind: str) -> bool:
    try:
        Image.new("RGB", (8, 6)).save(io.BytesIO(), kind)
    except (OSError, KeyError):
        return False
    return True
