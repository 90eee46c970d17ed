"""No picture of a record is lost without a word, whatever key or text names it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.configuration.run_config import DataSection
from cogtune.data.check import check
from cogtune.data.sources import collect_sources, read_sources
from cogtune.errors import DataError
from cogtune.processing.token_file import find_token_file
from tests.support.data_folders import dialogue, section, write_image, write_lines

ASK = {"role": "user", "content": "color?"}
SAY = {"role": "assistant", "content": "red"}


def said(value: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": value}, {"from": "gpt", "value": "red"}]


def read(folder: Path, *records: Any, name: str = "a.jsonl", **values: Any) -> list[tuple[str | None, str]]:
    """Picture and first question of every example."""
    write_image(folder / "p.png")
    write_lines(folder / name, records)
    examples, _ = read_sources(section(folder / name, **values))
    return [
        (next((image.name for image in one.images), None), one.conversations[0].turns[0].question) for one in examples
    ]


def refused(folder: Path, record: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(folder, record)
    return caught.value


@pytest.mark.parametrize("extra", [{"image": "p.png"}, {"images": ["p.png"]}, {"image": {"path": "p.png"}}])
def test_the_picture_of_a_message_is_read(tmp_path: Path, extra: dict[str, Any]) -> None:
    assert read(tmp_path, {"messages": [ASK | extra, SAY]}) == [("p.png", "color?")]


@pytest.mark.parametrize("text", ["Picture 1: <img>p.png</img>\ncolor?", "<img>p.png</img>color?"])
def test_a_path_in_img_tags_is_the_picture(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, {"conversations": said(text)}) == [("p.png", "color?")]


def test_img_tags_in_an_answer_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, {"messages": [ASK, {"role": "assistant", "content": "<img>p.png</img>"}]})
    assert error.code == "image-marker"


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode()


@pytest.mark.parametrize(
    ("key", "record"),
    [
        ("imgs", {"imgs": ["p.png"], "messages": [ASK, SAY]}),
        ("image_path", {"image_path": "p.png", "conversations": said("color?")}),
        ("img", {"img": {"path": "x/p.JPG"}, "messages": [ASK, SAY]}),
        ("photo", {"photo": "data:image/png;base64,AAAA", "messages": [ASK, SAY]}),
        ("view", {"view": PNG, "messages": [ASK, SAY]}),
        ("history", {"images": ["p.png"], "history": [["q", "a"]], "messages": [ASK, SAY]}),
        ("img", {"messages": [ASK | {"img": "p.png"}, SAY]}),
        ("system", {"image": "p.png", "system": "Be brief.", "conversations": [ASK, SAY]}),
        ("history", {"image": "p.png", "history": [["q", "a"]], "conversations": [ASK, SAY]}),
        ("images", {"image": None, "images": ["p.png"], "conversations": [ASK, SAY]}),
        ("image", {"image": None, "conversations": [ASK | {"image": "p.png"}, SAY]}),
        ("image_2", {"image": "p.png", "image_2": "q.png", "conversations": [ASK, SAY]}),
        ("audio", {"image": None, "audio": "a.wav", "conversations": [ASK, SAY]}),
        ("audios", {"audios": ["a.wav"], "query": "color?", "response": "red"}),
        ("reasoning_content", {"images": ["p.png"], "messages": [ASK, SAY | {"reasoning_content": "It is red."}]}),
    ],
)
def test_a_key_that_would_be_dropped_is_named(tmp_path: Path, key: str, record: Any) -> None:
    error = refused(tmp_path, record)
    assert error.code == "data-unread-key"
    assert f'"{key}"' in error.message


def test_a_caption_without_a_picture_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, {"image": None, "captions": [{"role": "caption", "content": "red"}]})
    assert (error.code, "a caption, and no picture" in error.message) == ("image-path", True)


def test_keys_that_lose_nothing_are_left_alone(tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "source": "coco",
        "history": [],
        "system": "",
        "imgs": None,
        "file_name": "p.png",
        "score": 3,
    }
    assert read(tmp_path, {"image": "p.png", "conversations": [ASK, SAY], **extra}) == [("p.png", "color?")]


def test_an_embedded_picture_under_another_name_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = write_image(tmp_path / "p.png").read_bytes()
    rows = [{"imgs": [{"bytes": data}], "messages": [ASK, SAY]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='"imgs"') as caught:
        read_sources(section(tmp_path / "a.parquet"))
    assert caught.value.code == "data-unread-key"


def test_a_column_that_would_be_dropped_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,question,answer,image_path\nnull,q,a,p.png\n")
    with pytest.raises(DataError, match='"image_path"'):
        read_sources(section(tmp_path / "a.csv"))


def test_a_label_with_a_history_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "images/p.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/p.json").write_text(json.dumps({"history": [["q", "a"]], "conversations": [ASK, SAY]}))
    with pytest.raises(DataError, match='"history"'):
        read_sources(section(tmp_path))


@pytest.mark.parametrize(("pictures", "warned"), [(0, True), (1, True), (10, False)])
def test_few_pictures_are_said(tmp_path: Path, pictures: int, warned: bool) -> None:
    write_image(tmp_path / "p.png")
    records = [{"image": "p.png" if n < pictures else None, **dialogue(f"q{n}?", f"a{n}")} for n in range(20)]
    write_lines(tmp_path / "a.jsonl", records)
    data: DataSection = section(tmp_path / "a.jsonl")
    _, report, _ = collect_sources(data)
    assert any(line.startswith("warning: ") and "picture" in line for line in report.lines()) is warned
    found = check(data, 0, find_token_file(None))
    assert ("few-pictures" in [finding.code for finding in found.warnings]) is warned
    assert not any("warning" in note for note in found.notes)


def test_deep_lists_are_looked_into_four_levels(tmp_path: Path) -> None:
    """Four hundred levels under a key that is not read ended in a RecursionError."""
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    record = {"image": None, **dialogue("q", "a")}
    assert len(read_sources(section(write_lines(tmp_path / "a.jsonl", [{**record, "other": deep}])))[0]) == 1
    hidden = {**record, "other": [[["x.png"]]]}
    with pytest.raises(DataError, match='"other" looks like a picture'):
        read_sources(section(write_lines(tmp_path / "b.jsonl", [hidden])))
