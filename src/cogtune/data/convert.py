"""Write a data set of any known format in cogtune's own: a folder of pictures and labels, or JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cogtune.data.records import Conversation, Example
from cogtune.errors import DataError, OutputFolderError
from cogtune.language import phrase, tr
from cogtune.processing.frames import Frame
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.locks import lock_beside

Told = Callable[[int, int], None]
_REMOVED = phrase("what was written is removed")


@dataclass(frozen=True)
class Converted:
    """Counts of what was written; ``copied``: pictures that were copied or linked next to the records."""

    place: Path
    pictures: int
    conversations: int
    copied: int


def write(examples: Sequence[Example], target: Path, *, link: bool = False, done: Told | None = None) -> Converted:
    """Write ``examples`` to ``target``: JSON lines if it ends in ``.jsonl``, else a folder in the published layout.

    A folder contains copies of the pictures or, with ``link``, symbolic links to them. JSON lines refer to pictures
    below the file's folder by path, and to copies of others in a new folder next to the file. ``target`` is renamed
    into place when it is complete; the next conversion removes what a killed one left.

    Raises:
        OutputFolderError: ``target`` exists, cannot be written, or another process writes it.
        DiskFullError: no space; what was written is removed.
        DataError: text-only records, which a folder has no place for.
    """
    _require_new(target)
    writer = _write_lines if target.suffix.lower() == ".jsonl" else _write_folder
    again = tr("then run the same command again")
    with lock_beside(target, tr("name another target")), explained(target, kept=tr(_REMOVED), then=again):
        _require_new(target)  # another conversion may have ended meanwhile
        return writer(examples, target, link, done)


def _require_new(target: Path) -> None:
    if os.path.lexists(target):
        raise OutputFolderError(
            tr("{target}: exists already", target=target), hint=tr("name a new one"), code="convert-target"
        )


def _picture(example: Example) -> Path:
    """Return the one picture of an example: both layouts name one a record.

    Raises:
        DataError: the example is about a clip.
    """
    (picture,) = example.images[:1]
    if isinstance(picture, Frame):
        raise DataError(
            tr("{source}: a clip; pictures are converted only", source=example.conversations[0].source),
            hint=tr("clips are read in their own layouts, see docs/guides/video.md"),
            code="data-media-clips",
        )
    return picture


def _write_folder(examples: Sequence[Example], target: Path, link: bool, done: Told | None) -> Converted:
    lonely = [example for example in examples if not example.images]
    if lonely:
        raise DataError(
            tr(
                "{source}: a text-only record ({lonely} in all); a folder matches labels with pictures",
                source=lonely[0].conversations[0].source,
                lonely=len(lonely),
            ),
            hint=tr("write JSON lines instead: name a target that ends in .jsonl"),
            code="convert-text-only",
        )
    with files.growing_folder(target) as growing:
        for name in ("images", "labels"):
            (growing / name).mkdir()
        names = _Names()
        for number, example in enumerate(examples, start=1):
            picture = _picture(example)
            name = names.take(picture)
            _place(picture, growing / "images" / name, link)
            records = [{"conversations": _messages(conversation)} for conversation in example.conversations]
            text = json.dumps(records[0] if len(records) == 1 else records, ensure_ascii=False, indent=1) + "\n"
            (growing / "labels" / f"{Path(name).stem}.json").write_text(text, encoding="utf-8")
            if done is not None:
                done(number, len(examples))
    return Converted(target, len(examples), _conversations(examples), len(examples))


def _write_lines(examples: Sequence[Example], target: Path, link: bool, done: Told | None) -> Converted:
    beside = target.with_name(f"{target.stem}-images")
    if files.is_unfinished(beside):
        shutil.rmtree(beside)  # of a conversion that was killed between its last two renames
    if os.path.lexists(beside):
        raise OutputFolderError(
            tr("{beside}: exists already, and would hold the pictures", beside=beside),
            hint=tr("name a new target"),
            code="convert-target",
        )
    files.clear_leftovers(target, locked=True)
    names, copied, with_picture = _Names(), 0, 0
    with ExitStack() as stack:
        growing = stack.enter_context(files.growing(target))
        copies = stack.enter_context(_growing_if_used(beside))
        file = stack.enter_context(growing.open("w", encoding="utf-8"))
        for number, example in enumerate(examples, start=1):
            image = None
            if example.images:
                with_picture += 1
                picture = _picture(example)
                image = _relative(picture, target.parent)
                if image is None:
                    name = names.take(picture)
                    _place(picture, copies() / name, link)
                    image, copied = f"{beside.name}/{name}", copied + 1
            for conversation in example.conversations:
                record = {"id": conversation.id, "image": image, "conversations": _messages(conversation)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if done is not None:
                done(number, len(examples))
    if copied:
        files.unmark(beside)
    return Converted(target, with_picture, _conversations(examples), copied)


@contextmanager
def _growing_if_used(folder: Path) -> Iterator[Callable[[], Path]]:
    """Gives the hidden folder that becomes ``folder`` at the end of the block, made when it is first asked for."""
    with ExitStack() as stack:

        @cache
        def made() -> Path:
            return stack.enter_context(files.growing_folder(folder, marked=True))

        yield made


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns:
        mark: dict[str, Any] = {} if turn.trained else {"loss": False}
        if turn.references:
            mark["references"] = list(turn.references)
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer, **mark}]
    return messages


def _conversations(examples: Iterable[Example]) -> int:
    return sum(len(example.conversations) for example in examples)


def _relative(image: Path, folder: Path) -> str | None:
    """Return the path of ``image`` relative to ``folder``, if it lies below it."""
    below = os.path.relpath(os.path.abspath(image), os.path.abspath(folder))
    return None if below.startswith("..") else Path(below).as_posix()


def _place(source: Path, target: Path, link: bool) -> None:
    if link:
        target.symlink_to(os.path.realpath(source))
        return
    try:
        source.open("rb").close()
    except OSError as error:
        raise DataError(
            tr("{source}: the picture cannot be read ({strerror})", source=source, strerror=error.strerror),
            hint=tr("check the path and the file's permissions"),
            code="image-missing" if isinstance(error, FileNotFoundError) else "image-unreadable",
        ) from error
    shutil.copyfile(source, target)


class _Names:
    """File names in one folder: the picture's own, with a number appended if that stem is taken."""

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
