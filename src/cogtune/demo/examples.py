"""Pictures and questions that the demo shows, chosen by position, not by how well they were answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from cogtune.demo.easyvqa import VqaPicture
from cogtune.demo.score import kind_of
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.processing.image import read_image

PICTURES = 12
_LONGEST_SHOWN = 24  # tokens, enough for the base's descriptions


@dataclass
class ShownPicture:
    """A picture with one question of each kind, the right answers, and each model's answers."""

    picture: VqaPicture
    image: Image.Image
    questions: list[tuple[str, str]]
    answers: dict[str, list[str]] = field(default_factory=dict)


def choose(pictures: Sequence[VqaPicture], count: int = PICTURES) -> list[ShownPicture]:
    """Return evenly spaced pictures of the test set."""
    count = min(count, len(pictures))
    chosen = [pictures[number * len(pictures) // count] for number in range(count)]
    return [ShownPicture(picture, read_image(picture.file), _one_of_each_kind(picture)) for picture in chosen]


def _one_of_each_kind(picture: VqaPicture) -> list[tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for question, answer in picture.questions:
        found.setdefault(kind_of(question, answer), (question, answer))
    return list(found.values())


def fill(examples: Sequence[ShownPicture], name: str, generator: Generator) -> None:
    """Add a model's answers under ``name``."""
    asks = [(example.image, question, ()) for example in examples for question, _ in example.questions]
    answers = iter(generator.answer_batch(asks, Decoding(max_new_tokens=_LONGEST_SHOWN)))
    for example in examples:
        example.answers[name] = [next(answers) for _ in example.questions]
