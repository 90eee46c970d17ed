"""What every reader yields for one record of a file, before pictures are opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cogtune.data.problems import BadRecordError
from cogtune.data.record_json import checked_text, is_blank
from cogtune.data.records import Turn
from cogtune.language import phrase, tr
from cogtune.processing.frames import Sampling


@dataclass(frozen=True)
class Embedded:
    """A picture stored inside the data file, as the bytes of an image file."""

    data: bytes


PictureSource = str | Embedded | tuple[str, ...]
"""A path as written; or several, of which the first that exists counts; or a picture's bytes."""


@dataclass(frozen=True)
class Content:
    """One record: independent dialogues, the pictures they are about, and the record's own id, if any.

    ``unread``: keys with a value that was not used. ``signs``: what the report counts, a key of `SIGNS` each.
    """

    dialogues: list[tuple[Turn, ...]]
    images: tuple[PictureSource, ...]
    identity: str | None = None
    repaired: bool = False
    unread: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()


SIGNS: dict[str, str] = {
    "asked": phrase("{count} questions were only a picture: data.caption_question stands in their place"),
    "late": phrase("{count} conversations show their picture after the first question; the model sees it before all"),
}
"""What is done to a record that its writer may not expect, as the report says it."""


@dataclass(frozen=True)
class Item:
    """A record to be parsed. ``number`` (from 1) and ``where`` name it in ids and messages.

    ``read`` parses it and raises BadRecordError for what is wrong, so one bad record does not stop the others.
    """

    number: int
    where: str
    read: Callable[[], Content]


@dataclass(frozen=True)
class RecordRules:
    """Settings for reading records: ``data.caption_question``, ``data.system``, and the most images of a prompt.

    ``open_questions``: a last question needs no answer (for prediction). ``clips``: for a video model, whose records
    name one clip each, how its frames are chosen. ``split`` and ``labels`` as in `SourceSection`. ``choices``: read the
    possible answers of questions. ``keep_unreadable``: a record whose pictures cannot be read is kept, and told apart
    (`Problems.unreadable`). ``box_question``: asks for the box of an expression.
    """

    caption_question: str | None
    system: str = "error"
    max_images: int = 1
    open_questions: bool = False
    clips: Sampling | None = None
    split: str | None = None
    labels: str = "auto"
    choices: bool = False
    keep_unreadable: bool = False
    box_question: str = ""

    def answer(self, value: Any) -> str:
        """The checked answer of a row; empty where it is missing and may be.

        Raises:
            BadRecordError: ``content``.
        """
        return "" if self.open_questions and is_blank(value) else checked_text(value, tr("the answer"))

    def check_images(self, count: int) -> None:
        """Raise BadRecordError ``several-images`` if a record has more images, or clips, than the model takes."""
        if self.clips is not None and count > 1:
            raise BadRecordError("several-images", tr("{count} clips, one was expected", count=count))
        if count > self.max_images:
            most = tr("one was") if self.max_images == 1 else tr("{max_images} were", max_images=self.max_images)
            raise BadRecordError(
                "several-images", tr("{count} pictures, at most {most} expected", count=count, most=most)
            )
