"""Answers marked as not to be trained are history; users' messages in pieces are one question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cogtune.data.budget import Budget
from cogtune.data.convert import write
from cogtune.data.records import Example
from cogtune.data.report import fingerprint
from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from cogtune.processing.token_file import find_token_file
from tests.support.data_folders import section, write_image, write_lines


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def examples(folder: Path, **record: Any) -> list[Example]:
    write_image(folder / "p.png")
    return read_sources(section(write_lines(folder / "a.jsonl", [record])))[0]


MARKS = [{"weight": 0}, {"loss": False}, {"train": False}, {"loss": 0}]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_marked_answer_is_history_only(tmp_path: Path, key: str, mark: dict[str, Any]) -> None:
    talk = [say("user", "q1"), say("assistant", "a1", **mark), say("user", "q2"), say("assistant", "a2", loss=None)]
    (example,) = examples(tmp_path, **{"image": "p.png", key: talk})
    assert [turn.trained for turn in example.conversations[0].turns] == [False, True]
    budget = Budget(find_token_file(None).encoder(), section(tmp_path))
    (fitted,) = budget.fit([example])
    assert [(sample.turn, sample.first) for sample in fitted.samples] == [(1, 0)], "trained with its history"
    assert budget.report.answers == 1


def test_it_is_counted_converted_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    talk = [say("user", "q1"), say("assistant", "a1"), say("user", "q2"), say("assistant", "a2")]
    plain = examples(tmp_path, image="p.png", conversations=talk)
    talk[1]["loss"] = False
    marked = examples(tmp_path, image="p.png", conversations=talk)
    assert fingerprint(marked) != fingerprint(plain)
    write(marked, tmp_path / "b.jsonl")
    again, report = read_sources(section(tmp_path / "b.jsonl"))
    assert again[0].conversations[0].turns == marked[0].conversations[0].turns
    assert any("1 answers are marked as not to be trained" in line for line in report.lines())


@pytest.mark.parametrize("name", ["b.jsonl", "b"])
def test_several_right_answers_are_converted(tmp_path: Path, name: str) -> None:
    talk = [say("user", "q1"), say("assistant", "red", references=["red", "red", "crimson"])]
    found = examples(tmp_path, image="p.png", conversations=talk)
    write(found, tmp_path / name)
    again, _ = read_sources(section(tmp_path / name))
    assert again[0].conversations[0].turns == found[0].conversations[0].turns
    assert again[0].conversations[0].turns[0].references == ("red", "red", "crimson")


PICTURE = [{"type": "image_url", "image_url": {"url": "p.png"}}]


@pytest.mark.parametrize(
    "asked",
    [
        [say("user", "color?"), say("user", PICTURE)],
        [say("user", PICTURE), say("user", [{"type": "text", "text": "color?"}])],
        [say("user", [{"image": "p.png"}, {"text": "color?"}])],
    ],
)
def test_words_and_picture_in_messages_of_their_own(tmp_path: Path, asked: list[Any]) -> None:
    (example,) = examples(tmp_path, messages=[*asked, say("assistant", "red")])
    assert [image.name for image in example.images] == ["p.png"]
    assert [(turn.question, turn.answer) for turn in example.conversations[0].turns] == [("color?", "red")]


def test_neighbouring_words_are_joined_and_answers_are_not(tmp_path: Path) -> None:
    (example,) = examples(
        tmp_path, images=["p.png"], messages=[say("user", "a"), say("user", "b"), say("assistant", "c")]
    )
    assert example.conversations[0].turns[0].question == "a\nb"
    with pytest.raises(DataError, match="message 3 is from the assistant"):
        examples(tmp_path, messages=[say("user", "a"), say("assistant", "b"), say("assistant", "c")])


def test_a_picture_shown_later_is_counted(tmp_path: Path) -> None:
    talk = [say("user", "hello"), say("assistant", "hi"), say("user", "<image>color?"), say("assistant", "red")]
    write_image(tmp_path / "p.png")
    path = write_lines(tmp_path / "a.jsonl", [{"images": ["p.png"], "messages": talk}])
    assert any("after the first question" in line for line in read_sources(section(path))[1].lines())


@pytest.mark.parametrize(
    "text", ["<IMG>p.png</IMG> color?", "![a](p.png) color?", "what is in photos/p.png", "<video>why?"]
)
def test_a_text_that_points_to_a_picture_is_said(tmp_path: Path, text: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [say("user", text), say("assistant", "red")]}])
    lines = read_sources(section(path))[1].lines()
    assert any(line.startswith("warning: ") and "points to one" in line and "a.jsonl:1" in line for line in lines)
