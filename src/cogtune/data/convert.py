"""Write what was read, in any format, as ours: a folder of pictures and labels, or JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.data.records import Conversation, Example
from cogtune.errors import DataError, OutputFolderError
from cogtune.system import files

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """What was written; ``copied`` counts pictures that were copied (or linked) beside the records."""

    place: Path
    pictures: int
    conversations: int
    copied: int


def write(examples: Sequence[Example], target: Path, *, link: bool = False, done: Told | None = None) -> Converted:
    """Write ``examples`` to ``target``: JSON lines where it ends in ``.jsonl``, else a folder in the published layout.

    A folder gets copies of the pictures, with ``link`` symbolic links to them. Lines name pictures that lie below the
    file's folder by their path, and others by their copies in a folder beside the file. ``target`` appears when it is
    whole.

    Raises:
        OutputFolderError: ``target`` exists.
        DataError: text-only records, which a folder has no place for.
    """
    if target.exists():
        raise OutputFolderError(f"{target}: exists already", hint="name a new one", code="convert-target")
    if target.suffix.lower() == ".jsonl":
        return _write_lines(examples, target, link, done)
    return _write_folder(examples, target, link, done)


def _write_folder(examples: Sequence[Example], target: Path, link: bool, done: Told | None) -> Converted:
    lonely = [example for example in examples if not example.images]
    if lonely:
        raise DataError(
            f"{lonely[0].conversations[0].source}: a text-only record ({len(lonely)} in all); a folder matches labels"
            " with pictures",
            hint="write JSON lines instead: name a target that ends in .jsonl",
            code="convert-text-only",
        )
    with files.growing_folder(target) as growing:
        for name in ("images", "labels"):
            (growing / name).mkdir()
        names = _Names()
        for number, example in enumerate(examples, start=1):
            (picture,) = example.images  # both layouts name one
            name = names.take(picture)
            _place(picture, growing / "images" / name, link)
            records = [{"conversations": _messages(conversation)} for conversation in example.conversations]
            text = json.dumps(records[0] if len(records) == 1 else records, ensure_ascii=False, indent=1) + "\n"
            (growing / "labels" / f"{Path(name).stem}.json").write_text(text, encoding="utf-8")
            if done is not None:
                done(number, len(examples))
    return Converted(target, len(examples), _conversations(examples), len(examples))


def _write_lines(examples: Sequence[Example], target: Path, link: bool, done: Told | None) -> Converted:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.stem}-images")
    if beside.exists():
        raise OutputFolderError(
            f"{beside}: exists already, and would hold the pictures", hint="name a new target", code="convert-target"
        )
    names, copied, with_picture = _Names(), 0, 0
    with files.growing(target) as growing, growing.open("w", encoding="utf-8") as file:
        for number, example in enumerate(examples, start=1):
            image = None
            if example.images:
                with_picture += 1
                (picture,) = example.images
                image = _relative(picture, target.parent)
                if image is None:
                    beside.mkdir(exist_ok=True)
                    name = names.take(picture)
                    _place(picture, beside / name, link)
                    image, copied = f"{beside.name}/{name}", copied + 1
            for conversation in example.conversations:
                record = {"id": conversation.id, "image": image, "conversations": _messages(conversation)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if done is not None:
                done(number, len(examples))
    return Converted(target, with_picture, _conversations(examples), copied)


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    pairs = (("user", "question"), ("assistant", "answer"))
    return [{"role": role, "content": getattr(turn, part)} for turn in conversation.turns for role, part in pairs]


def _conversations(examples: Iterable[Example]) -> int:
    return sum(len(example.conversations) for example in examples)


def _relative(image: Path, folder: Path) -> str | None:
    """``image`` from ``folder``, if it lies below it."""
    below = os.path.relpath(os.path.abspath(image), os.path.abspath(folder))
    return None if below.startswith("..") else Path(below).as_posix()


def _place(source: Path, target: Path, link: bool) -> None:
    if link:
        target.symlink_to(os.path.realpath(source))
    else:
        shutil.copyfile(source, target)


class _Names:
    """File names in one folder: the picture's own, numbered where another with that stem was there before."""

    def __init__(self) -> None:
        self._stems: set[str] = set()

    def take(self, image: Path) -> str:
        own = unicodedata.normalize("NFC", image.stem).lstrip(".") or "picture"
        stem, number = own, 1
        while stem.casefold() in self._stems:
            number += 1
            stem = f"{own}-{number}"
        self._stems.add(stem.casefold())
        return stem + image.suffix
