"""Answers count only when they are the reference, and what needs no picture is learned from training answers alone."""

from __future__ import annotations

from pathlib import Path

from cogtune.demo.easyvqa import VqaPicture
from cogtune.demo.score import kind_of, score, without_pictures


def picture(*questions: tuple[str, str]) -> VqaPicture:
    return VqaPicture("00000", Path("none.png"), questions)


def test_kinds_follow_question_and_answer() -> None:
    assert kind_of("is there a red shape?", "no") == "yes or no"
    assert kind_of("what color is the shape?", "teal") == "colour"
    assert kind_of("what is the teal shape?", "circle") == "shape"


def test_an_answer_with_one_word_more_is_wrong() -> None:
    asked = [picture(("is there a circle?", "yes"), ("what shape is present?", "circle"))]
    found = score(["yes", "circle circle"], asked)
    assert (found.right, found.total, found.accuracy) == (1, 2, 0.5)
    assert found.by_kind == {"yes or no": (1, 1), "shape": (0, 1)}
    assert found.to_dict()["by_kind"]["shape"] == {"right": 0, "total": 1, "accuracy": 0.0}


def test_without_pictures_learns_from_training_and_is_measured_on_test() -> None:
    train = [picture(("is there a circle?", "no"), ("is there a circle?", "no"), ("is there not a circle?", "yes"))]
    test = [picture(("is there a circle?", "yes"), ("is there not a circle?", "yes"), ("never seen?", "no"))]
    found = without_pictures(train, test)
    assert found["always “no”"].answers == ("no", "no", "no")
    assert found["most frequent answer to each question"].answers == ("no", "yes", "no")
    assert found["most frequent answer to each question"].right == 2
