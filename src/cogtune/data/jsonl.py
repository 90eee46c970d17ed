"""JSON lines: ``{"image": path or null, "conversations": [...]}``; lines naming the same picture become one picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogtune.data.labels import is_unicode, parse_json, record_dialogues
from cogtune.data.pictures import check_picture, in_threads
from cogtune.data.problems import BadRecordError, Problem, Problems
from cogtune.data.records import Conversation, Picture, Turn
from cogtune.data.report import DataReport, SourceReport


@dataclass
class _Group:
    """The conversations on one picture file (None: one text-only line), gathered before the file is looked at."""

    image: Path | None
    conversations: list[Conversation] = field(default_factory=list)
    image_bytes: int = 0
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class JsonlReader:
    """How the ``.jsonl`` files of one entry of ``data.path`` are read; picture paths are relative to the file's folder.

    ``names`` gives each file the name that stands in ids without an own one (``name:line``).
    """

    root: Path
    files: tuple[Path, ...]
    names: dict[Path, str]
    name: str
    split_name: str
    weight: float
    caption_question: str | None
    max_pixels: int | None

    def read(self, problems: Problems, report: DataReport) -> list[Picture]:
        """Pictures in the order of their first line; problems and counts go into the two arguments.

        :raises DataError: when the files hold no line.
        """
        groups: dict[str, _Group] = {}
        lines = 0
        for file in self.files:
            for number, line in _numbered_lines(file):
                lines += 1
                where = f"{file}:{number}"
                try:
                    if self._read_line(line, file, number, where, groups):
                        report.repaired["trailing-comma"] = report.repaired.get("trailing-comma", 0) + 1
                except BadRecordError as bad:
                    problems.add(bad.kind, where, bad.what)
        if not lines:
            named = ", ".join(str(file) for file in self.files)
            raise Problem("no-records", named, "no line in it").error()
        source = SourceReport(str(self.root), "jsonl", self.weight)
        report.sources.append(source)
        pictures = []
        for group in in_threads(self._check, list(groups.values())):
            if group.problem is not None:
                kind, what = group.problem
                problems.add(kind, group.conversations[0].source, what, records=len(group.conversations))
                continue
            picture = self._picture(group)
            source.count(picture)
            pictures.append(picture)
        return pictures

    def _read_line(self, line: bytes, file: Path, number: int, where: str, groups: dict[str, _Group]) -> bool:
        """Put one line's conversations into their group; whether the line had to be repaired."""
        record, repaired = parse_json(line)
        dialogues = record_dialogues(record, self.caption_question)
        image = _image_path(record, file.parent)
        identity = _identity(record) or f"{self.names[file]}:{number}"
        group_key = where if image is None else os.path.normpath(image)
        group = groups.setdefault(group_key, _Group(image))
        for position, turns in enumerate(dialogues):
            own = identity if len(dialogues) == 1 else f"{identity}#{position}"
            group.conversations.append(Conversation(own, image, turns, where))
        return repaired

    def _check(self, group: _Group) -> _Group:
        if group.image is None:
            return group
        try:
            if not group.image.is_file():
                raise BadRecordError("image-missing", f"the picture {group.image} does not exist")
            group.image_bytes = check_picture(group.image, self.max_pixels)
        except BadRecordError as bad:
            named = "" if bad.kind == "image-missing" else f"{group.image}: "
            group.problem = (bad.kind, named + bad.what)
        return group

    def _picture(self, group: _Group) -> Picture:
        conversations = tuple(group.conversations)
        if group.image is None:
            return Picture(conversations[0].id, None, conversations, self.weight, text_key(conversations))
        relative = Path(os.path.relpath(group.image, self.root)).as_posix()
        return Picture(
            key=f"{self.name}/{relative}",
            image=group.image,
            conversations=conversations,
            weight=self.weight,
            split_key=f"{self.split_name}/{relative}",
            image_bytes=group.image_bytes,
        )


def text_key(conversations: Iterable[Conversation]) -> str:
    """What a text-only record is split by: its text, wherever it stands."""
    digest = hashlib.sha256()
    for conversation in conversations:
        for turn in conversation.turns:
            digest.update(_delimited(turn))
    return f"text:{digest.hexdigest()}"


def _delimited(turn: Turn) -> bytes:
    return b"\x00".join((turn.question.encode(), turn.answer.encode(), b""))


def _numbered_lines(file: Path) -> Iterable[tuple[int, bytes]]:
    """``(number from 1, line)`` of every line that is not blank."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise Problem("no-such-path", str(file), f"cannot be read ({error})").error() from error


def _image_path(record: dict[str, Any], folder: Path) -> Path | None:
    if "image" not in record:
        raise BadRecordError("image-path", 'the record has no "image"')
    image = record["image"]
    if image is None:
        return None
    if not isinstance(image, str) or not image or "\0" in image or not is_unicode(image):
        raise BadRecordError("image-path", f'"image" is {image!r}, a path or null was expected')
    return folder / image


def _identity(record: dict[str, Any]) -> str | None:
    if "id" not in record:
        return None
    identity = record["id"]
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or not is_unicode(str(identity)):
        raise BadRecordError("id", f'"id" is {identity!r}')
    if not str(identity).strip():
        raise BadRecordError("id", '"id" is empty')
    return str(identity)
