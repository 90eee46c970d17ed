"""What every reader gives for one record of a file, before pictures are looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cogtune.data.records import Turn


@dataclass(frozen=True)
class Embedded:
    """A picture that came inside the file: its bytes as they would stand in a file of their own."""

    data: bytes


PictureSource = str | Embedded | tuple[str, ...] | None
"""A path as written, or several of which the first that exists is meant; a picture's bytes; None: text only."""


@dataclass(frozen=True)
class Content:
    """One record: its independent dialogues, the picture they are about, and the record's own id, if it has one."""

    dialogues: list[tuple[Turn, ...]]
    image: PictureSource
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
class Wording:
    """The settings that decide what a record's texts become: ``data.caption_question`` and ``data.system``."""

    caption_question: str | None
    system: str = "error"
