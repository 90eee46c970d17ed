"""The parts of a data set: turns, conversations and examples.

An `Example` is the unit of splitting, ordering and tree building: images and all conversations about them, or a
text-only record. Each answer in it is trained as a sample of its own (`data.budget.Sample`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cogtune.processing.frames import Frame

ImageRef = Path | Frame
"""Identifies an image: a picture's file, or a frame of a clip. Features are stored under it: equal references mean
equal pixels. Its text is unique."""


def file_of(image: ImageRef) -> Path:
    """Return the file that an image is in."""
    return image.path if isinstance(image, Frame) else image


@dataclass(frozen=True, slots=True)
class RawBoxes:
    """Boxes as a record's numbers give them; ``size``: width and height that the record says of its picture."""

    boxes: tuple[tuple[float, float, float, float], ...]
    size: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer, as written in the label (never stripped or rewrapped).

    ``trained``: False for an answer that the data marks as not to be trained; it is history for later ones.
    ``references``: every right answer, repeated as often as people gave it, where the data has several. Evaluation
    compares with them; the answer alone is trained. ``choices``: the answers that a closed question allows, where
    they were asked for and the data has some. ``boxes``: the answer's, until the pictures are known
    (`cogtune.data.grounding`).
    """

    question: str
    answer: str
    trained: bool = True
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    boxes: RawBoxes | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """One dialogue. ``id`` is the record's key in predictions; ``source`` is ``file:record`` for messages."""

    id: str
    turns: tuple[Turn, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Example:
    """Images in order with all conversations about them, or one text-only record.

    ``key`` is ``folder/stem`` (JSONL: ``folder/relative path``; text-only: the record's id), where ``folder`` is as
    much of the data root's path as it takes to tell the roots apart. ``split_key`` uses the root's own name only, so
    that it stays the same when further roots are added. ``image_bytes`` are the files' sizes, part of the fingerprint.
    """

    key: str
    images: tuple[ImageRef, ...]
    conversations: tuple[Conversation, ...]
    weight: float = 1.0
    split_key: str = ""
    image_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its reference history, as prediction and evaluation ask it.

    ``reference`` is None where the data set has no answer; ``references`` are all right answers, and empty then.
    ``choices``: the answers that are possible; none: any answer is.
    """

    id: str
    turn: int
    images: tuple[ImageRef, ...]
    question: str
    reference: str | None
    history: tuple[tuple[str, str], ...]
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def iter_questions(examples: Iterable[Example]) -> Iterator[Question]:
    """Yield every question in data set order; ``turn`` counts from 0, and ``history`` holds the turns before it."""
    for example in examples:
        for conversation in example.conversations:
            pairs = tuple((turn.question, turn.answer) for turn in conversation.turns)
            for number, turn in enumerate(conversation.turns):
                right = turn.references or ((turn.answer,) if turn.answer.strip() else ())
                asked = (conversation.id, number, example.images, turn.question, turn.answer or None)
                yield Question(*asked, pairs[:number], right, turn.choices)


def next_images(shown: Iterable[tuple[ImageRef, ...]]) -> dict[tuple[ImageRef, ...], tuple[ImageRef, ...]]:
    """Map the images of each record to those of the next one with as many and others; without one, to themselves."""
    groups: dict[int, dict[tuple[ImageRef, ...], None]] = {}
    for images in shown:
        groups.setdefault(len(images), {})[images] = None
    listed = [list(group) for group in groups.values()]
    return {images: group[(at + 1) % len(group)] for group in listed for at, images in enumerate(group)}
