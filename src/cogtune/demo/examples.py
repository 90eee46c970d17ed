"""Pictures and questions that the demo asks its merged model, chosen by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from cogtune.demo.easyvqa import VqaPicture
from cogtune.demo.score import kind_of
from cogtune.processing.image import read_image

PICTURES = 3


@dataclass
class ShownPicture:
    """A picture with one question of each kind and its right answer."""

    picture: VqaPicture
    image: Image.Image
    questions: list[tuple[str, str]]


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
