"""easy-VQA is found without importing it, and written as a data folder that training reads."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from cogtune.configuration.run_config import DataSection
from cogtune.data.records import iter_questions
from cogtune.data.sources import read_sources
from cogtune.demo.easyvqa import find_easy_vqa, read_split, write_folder
from cogtune.errors import SetupError
from cogtune.system import files


def test_the_official_split_is_whole() -> None:
    folder = find_easy_vqa()
    train, test = read_split(folder, "train"), read_split(folder, "test")
    assert (len(train), sum(len(picture.questions) for picture in train)) == (4000, 38575)
    assert (len(test), sum(len(picture.questions) for picture in test)) == (1000, 9673)


def test_nothing_of_the_package_is_imported() -> None:
    find_easy_vqa()
    assert "easy_vqa" not in sys.modules


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(SetupError) as caught:
        find_easy_vqa()
    assert caught.value.exit_code == 2
    assert caught.value.hint == f"{sys.executable} -m pip install easy-vqa"


def test_the_data_folder_gives_back_every_question(tmp_path: Path) -> None:
    pictures = read_split(find_easy_vqa(), "test", limit=5)
    write_folder(pictures, tmp_path / "test")
    found, _ = read_sources(DataSection.model_validate({"path": [str(tmp_path / "test")]}))
    asked = [(question.question, question.reference) for question in iter_questions(found)]
    assert asked == [pair for picture in pictures for pair in picture.questions]
    assert [image.read_bytes() for picture in found for image in picture.images] == [
        p.file.read_bytes() for p in pictures
    ]
    assert all(len(conversation.turns) == 1 for picture in found for conversation in picture.conversations)


def test_half_a_folder_is_written_again(tmp_path: Path) -> None:
    pictures = read_split(find_easy_vqa(), "test", limit=3)
    (tmp_path / ".test.partial" / "images").mkdir(parents=True)
    (tmp_path / ".test.partial" / "images" / "99999.png").touch()
    (tmp_path / ".test.partial" / files.MARK).touch()
    write_folder(pictures, tmp_path / "test")
    assert [file.name for file in sorted((tmp_path / "test" / "images").iterdir())] == [
        "00000.png", "00001.png", "00002.png",
    ]  # fmt: skip
    assert not (tmp_path / ".test.partial").exists()
