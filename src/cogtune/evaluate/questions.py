"""What is asked: every question of the data with an answer to compare with, each once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cogtune.data.records import Example, ImageRef, Question, file_of, iter_questions, next_images


@dataclass(frozen=True)
class Asked:
    """Questions in data order, and what was not taken.

    Attributes:
        pictures: the number of each question's picture, from 0; several pictures shown together, or a record without
            one, count as one picture.
        unanswered: questions of the data without a right answer.
        joined: questions that are another one's further right answer: the same words about the same pictures.
        aside: id and turn of both.
        sets: the validation set of each question, if there are any with names.
    """

    questions: list[Question]
    pictures: list[int]
    unanswered: int = 0
    joined: int = 0
    aside: frozenset[tuple[str, int]] = frozenset()
    sets: tuple[str, ...] = ()

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The right answers of each question."""
        return [question.references for question in self.questions]


def collect(examples: Iterable[Example]) -> Asked:
    """Return the questions of a data set; see `join`."""
    return join(iter_questions(examples))


def join(questions: Iterable[Question]) -> Asked:
    """Number the pictures of questions; equal questions about equal pictures become one with several right answers.

    So the five captions of a COCO picture are five references of one question.
    """
    found: dict[tuple[object, ...], Question] = {}
    aside: set[tuple[str, int]] = set()
    unanswered = joined = 0
    for question in questions:
        if not question.references:
            unanswered += 1
            aside.add((question.id, question.turn))
            continue
        key = (question.images or question.id, question.question, question.history)
        if key in found:
            joined += 1
            aside.add((question.id, question.turn))
            found[key] = replace(found[key], references=found[key].references + question.references)
        else:
            found[key] = question
    return replace(number(list(found.values())), unanswered=unanswered, joined=joined, aside=frozenset(aside))


def number(questions: list[Question]) -> Asked:
    """Return questions with the numbers of their pictures."""
    places: dict[object, int] = {}
    pictures = [places.setdefault(question.images or question.id, len(places)) for question in questions]
    return Asked(questions, pictures)


def swapped(questions: Iterable[Question]) -> list[Question]:
    """Return the questions, each about the pictures of the next record with as many and others.

    A record without pictures stays as it is; so does one that has no partner.
    """
    asked = list(questions)
    following = next_images(question.images for question in asked)
    return [replace(question, images=following[question.images]) for question in asked]


def blanked(questions: Iterable[Question], blank: Path) -> list[Question]:
    """Return the questions with every picture replaced by the file ``blank``."""
    return [replace(question, images=(blank,) * len(question.images)) for question in questions]


def files_of(images: Iterable[ImageRef]) -> list[str]:
    """Return the files that images are in, each once: a clip's frames are in one."""
    return list(dict.fromkeys(str(file_of(image)) for image in images))
