"""The marker of a picture is no part of the question, whichever model's data it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.data.check import check
from cogtune.data.sources import collect_sources, read_sources
from cogtune.errors import DataError
from cogtune.processing.token_file import find_token_file
from tests.support.data_folders import dialogue, section, write_image, write_lines

KNOWN = [
    "<image>\n",
    "<Image>\n",
    "<image1>\n",
    "<|image_1|>\n",
    "<|image|>",
    "<image_placeholder>\n",
    "<ImageHere>",
    "<IMG_CONTEXT><IMG_CONTEXT>\n",
    "<img></img>\n",
    "<img><IMG_CONTEXT></img>\n",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<image></image>\n",
    "<im_start><image><im_end>\n",
    "<start_of_image>",
    "<|begin_of_image|><|endoftext|><|end_of_image|>",
    "[IMG][IMG][IMG_BREAK][IMG_END]",
]


def llava(question: str) -> dict[str, Any]:
    return {"image": "p.png", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]}


def own(question: str) -> dict[str, Any]:
    return {"image": "p.png", **dialogue(question, "red")}


def questions(folder: Path, *records: Any) -> list[str]:
    write_image(folder / "p.png")
    write_lines(folder / "a.jsonl", records)
    examples, _ = read_sources(section(folder / "a.jsonl"))
    return [turn.question for one in examples for talk in one.conversations for turn in talk.turns]


@pytest.mark.parametrize("marker", KNOWN)
@pytest.mark.parametrize("record", [llava, own])
def test_known_markers_are_removed_at_either_end(tmp_path: Path, record: Any, marker: str) -> None:
    end = "\n" + marker.strip()
    assert questions(tmp_path, record(f"{marker}color?"), record(f"color?{end}")) == ["color?", "color?"]


def test_in_labels_and_tables(tmp_path: Path) -> None:
    write_image(tmp_path / "images/p.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/p.json").write_text(json.dumps(dialogue("<image>\ncolor?", "red")))
    (tmp_path / "a.csv").write_text('image,question,answer\nimages/p.png,"<image>\ncolor?",red\n')
    for path in (tmp_path, tmp_path / "a.csv"):
        (example,), _ = read_sources(section(path))
        assert example.conversations[0].turns[0].question == "color?"


def test_one_marker_a_picture_is_removed(tmp_path: Path) -> None:
    assert questions(tmp_path, own("<image>\n<image> is a tag?")) == ["<image> is a tag?"]


def test_a_text_alone_keeps_its_tags(tmp_path: Path) -> None:
    assert questions(tmp_path, own("<image> in HTML?") | {"image": None}) == ["<image> in HTML?"]


@pytest.mark.parametrize("marker", ["<image1>", "<|image|>"])
def test_a_known_marker_without_a_picture_is_refused(tmp_path: Path, marker: str) -> None:
    with pytest.raises(DataError, match="names no picture"):
        questions(tmp_path, llava(f"{marker}\ncolor?") | {"image": None})


def test_a_question_that_is_only_a_marker_becomes_the_captions_question_and_is_counted(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "p.png"}}]
    openai = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]}
    for record in (llava("<image>"), own("<image>\n"), llava("<img>p.png</img>") | {"image": None}, openai):
        assert questions(tmp_path, record) == ["Describe this image in detail."]
        _, report, _ = collect_sources(section(tmp_path / "a.jsonl"))
        assert any(line.startswith("1 questions were only a picture") for line in report.lines())


def test_a_question_without_words_or_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="message 1 is empty"):
        questions(tmp_path, llava(" ") | {"image": None})


@pytest.mark.parametrize("tag", ["<my_image_7b>", "</img>", "<video>", "[image 1]"])
def test_other_tags_are_counted_and_said(tmp_path: Path, tag: str) -> None:
    kept = f"{tag}\ncolor?"
    assert questions(tmp_path, own(kept), own("shape?")) == [kept, "shape?"]
    data = section(tmp_path / "a.jsonl")
    _, report, _ = collect_sources(data)
    (line,) = [line for line in report.lines() if line.startswith("warning")]
    assert tag in line
    assert "1 conversations" in line
    assert "a.jsonl:1" in line
    (found,) = [one for one in check(data, 0, find_token_file(None)).warnings if one.code == "picture-tag"]
    assert found.where.endswith("a.jsonl:1")
