"""What every reader gives for one record of a file, before pictures are looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cogtune.data.problems import BadRecordError
from cogtune.data.records import Turn


@dataclass(frozen=True)
class Embedded:
    """A picture that came inside the file: its bytes as they would stand in a file of their own."""

    data: bytes


PictureSource = str | Embedded | tuple[str, ...]
"""A path as written, or several of which the first that exists is meant; a picture's bytes."""


@dataclass(frozen=True)
class Content:
    """One record: its independent dialogues, the pictures they are about, and the record's own id, if it has one."""

    dialogues: list[tuple[Turn, ...]]
    images: tuple[PictureSource, ...]
    identity: str | None = None
    repaired: bool = False


@dataclass(frozen=True)
class Item:
    """``number`` (from 1) and ``where`` name the record in ids and messages.

    ``read`` parses it and raises BadRecordError for what is wrong with it, so that one bad record costs only itself.
    """

    number: int
    where: str
    read: Callable[[], Content]


@dataclass(frozen=True)
class RecordRules:
    """What decides how a record is read: ``data.caption_question``, ``data.system``, and how many images a prompt of
    the model takes."""

    caption_question: str | None
    system: str = "error"
    max_images: int = 1

    def check_images(self, count: int) -> None:
        """Raise BadRecordError ``several-images`` for a record of more images than the model takes."""
        if count > self.max_images:
            most = "one was" if self.max_images == 1 else f"{self.max_images} were"
            raise BadRecordError("several-images", f"{count} pictures, at most {most} expected")
