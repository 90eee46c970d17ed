"""A picture's path that no file system takes costs its record, with a short message; bytes in its place are read."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.data.records import Example
from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from tests.support.data_folders import dialogue, section, write_image, write_lines

FORMS = ("jsonl", "llava", "csv", "coco")
ENCODED = "data:image/png;base64,"


def write(folder: Path, form: str, image: str) -> Path:
    if form == "csv":
        (folder / "a.csv").write_text(f'image,question,answer\n"{image}",q,a\n')
        return folder / "a.csv"
    if form == "coco":
        root = {"images": [{"id": 1, "file_name": image}], "annotations": [{"image_id": 1, "caption": "c"}]}
        (folder / "a.json").write_text(json.dumps(root))
        return folder / "a.json"
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    record: dict[str, Any] = {"image": image, "conversations": talk} if form == "llava" else {}
    return write_lines(folder / "a.jsonl", [record or {"image": image, **dialogue("q", "a")}])


def read(folder: Path, form: str, image: str) -> list[Example]:
    return read_sources(section(write(folder, form, image), extract_dir=folder / "out"))[0]


def refused(folder: Path, form: str, image: str) -> DataError:
    with pytest.raises(DataError) as caught:
        read(folder, form, image)
    return caught.value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", ["", ENCODED])
def test_base64_in_place_of_a_path_is_the_picture(tmp_path: Path, form: str, before: str) -> None:
    data = write_image(tmp_path / "p.png").read_bytes()
    (example,) = read(tmp_path, form, before + base64.b64encode(data).decode())
    assert example.images[0].read_bytes() == data


@pytest.mark.parametrize("form", FORMS)
def test_a_name_too_long_for_the_file_system(tmp_path: Path, form: str) -> None:
    error = refused(tmp_path, form, "x" * 3000 + ".png")
    assert error.code == "image-unreadable"
    assert "too long" in error.message
    assert "x" * 81 not in error.message


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_base64_picture(tmp_path: Path, form: str) -> None:
    assert refused(tmp_path, form, "iVBORw0KGgo" + "A" * 402).code == "image-unreadable"


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_without_permission(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_file = Path.is_file

    def locked(path: Path) -> bool:
        if path.name == "p.png":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", locked)
    error = refused(tmp_path, form, "p.png")
    assert error.code == "image-unreadable"
    assert "Permission denied" in error.message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("/i\0.png", "image-path"),
        ("file:///a%00b", "image-path"),
        ("http://[a", "image-url"),
        ("ftp://x/a", "image-url"),
    ],
)
def test_what_is_no_path(tmp_path: Path, form: str, image: str, code: str) -> None:
    assert refused(tmp_path, form, image).code == code


def test_shown_values_are_short(tmp_path: Path) -> None:
    record = {"image": "y" * 300, "id": ["z" * 300], **dialogue("q", "a")}
    for bad in (record, record | {"id": 1, "image": ["y" * 300]}):
        write_lines(tmp_path / "a.jsonl", [bad])
        with pytest.raises(DataError) as caught:
            read_sources(section(tmp_path / "a.jsonl"))
        assert "y" * 81 not in caught.value.message
        assert "z" * 81 not in caught.value.message
