"""From ``data.path`` to pictures: finds each entry's format, names it, reads it and settles what was wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.data.folder import LABEL_FOLDERS, FolderReader
from cogtune.data.jsonl import JsonlReader
from cogtune.data.problems import Problem, Problems
from cogtune.data.records import Picture
from cogtune.data.report import DataReport
from cogtune.errors import DataError

if TYPE_CHECKING:
    from cogtune.configuration.run import DataSection


@dataclass(frozen=True)
class _Entry:
    """One entry of ``data.path``: its root folder and, for JSON lines, the files."""

    root: Path
    files: tuple[Path, ...]
    weight: float


def read_sources(data: DataSection, paths: Sequence[Any] | None = None) -> tuple[list[Picture], DataReport]:
    """Read every folder and ``.jsonl`` file of ``data.path`` (or of ``paths``).

    Folders are read in the given order, their pictures in the order of their names.

    :raises DataError: for bad input, unless ``data.on_bad`` is ``skip`` and no more than ``data.max_bad_share`` is bad.
    """
    report, problems = DataReport(), Problems()
    given = list(data.path if paths is None else paths)
    entries = [_entry(item, report) for item in given]
    if not entries:
        raise DataError("data.path is empty", hint="name a folder: --data DIR", code="data-no-such-path")
    _refuse_repeats(entries)
    folders = _names([entry.root for entry in entries])
    files = _names([file for entry in entries for file in entry.files])
    pictures: list[Picture] = []
    for entry in entries:
        common: dict[str, Any] = {
            "root": entry.root,
            "name": folders[entry.root],
            "split_name": _absolute(entry.root).name,
            "weight": entry.weight,
            "caption_question": data.caption_question,
            "max_pixels": data.max_pixels,
        }
        reader: FolderReader | JsonlReader = (
            JsonlReader(files=entry.files, names=files, **common)
            if entry.files
            else FolderReader(labels=data.labels, **common)
        )
        pictures += reader.read(problems, report)
    pictures = _without_repeated_ids(_merged(pictures), problems)
    good = sum(len(picture.conversations) for picture in pictures)
    problems.settle(good, data.on_bad, data.max_bad_share)
    report.bad, report.bad_examples = dict(problems.lost), problems.examples()
    report.close(pictures)
    return pictures, report


def _entry(item: Any, report: DataReport) -> _Entry:
    """``item``: a path, or an object with ``path`` and ``weight``."""
    plain = isinstance(item, (str, os.PathLike))
    path, weight = (Path(item), 1.0) if plain else (Path(item.path), float(item.weight))
    path = path.expanduser()
    if not path.exists():
        raise Problem("no-such-path", str(path), "no such file or folder").error()
    if path.is_file():
        if path.suffix.lower() != ".jsonl":
            raise Problem("no-such-path", str(path), "a file that does not end in .jsonl").error()
        return _Entry(path.parent, (path,), weight)
    lines = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() == ".jsonl" and file.is_file()))
    if not lines or any((path / name).is_dir() for name in LABEL_FOLDERS):
        if lines:
            report.notes.append(f"{path} has label folders: its .jsonl files are not read ({lines[0].name}, ...)")
        return _Entry(path, (), weight)
    return _Entry(path, lines, weight)


def _refuse_repeats(entries: Iterable[_Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        for path in entry.files or (entry.root,):
            real = os.path.realpath(path)
            if real in seen:
                raise DataError(
                    f"{path}: named twice in data.path",
                    hint="to see its records more often, give it a weight: {path: DIR, weight: 2}",
                    code="data-duplicate-id",
                )
            seen.add(real)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """For each path its own name, with as many parents as it takes to tell the different ones apart."""
    names: dict[Path, str] = {}
    absolute = {path: _absolute(path).parts for path in paths}
    different = set(absolute.values())
    for path, parts in absolute.items():
        length = 1
        while length < len(parts) and sum(other[-length:] == parts[-length:] for other in different) > 1:
            length += 1
        names[path] = "/".join(parts[-length:])
    return names


def _merged(pictures: list[Picture]) -> list[Picture]:
    """Join pictures that several ``.jsonl`` files of one folder name with the same weight; the first place counts."""
    merged: dict[tuple[str, float], Picture] = {}
    for picture in pictures:
        slot = (picture.key, picture.weight)
        if slot in merged and picture.image is not None:
            first = merged[slot]
            picture = replace(first, conversations=first.conversations + picture.conversations)
        elif slot in merged:
            slot = (f"{picture.key}\0{len(merged)}", picture.weight)
        merged[slot] = picture
    return list(merged.values())


def _without_repeated_ids(pictures: list[Picture], problems: Problems) -> list[Picture]:
    """Drop and report every conversation whose id was used before: predictions are found by their ids."""
    seen: dict[str, str] = {}
    kept: list[Picture] = []
    for picture in pictures:
        conversations = []
        for conversation in picture.conversations:
            if conversation.id in seen:
                what = f"the id {conversation.id!r} was already used in {seen[conversation.id]}"
                problems.add("duplicate-id", conversation.source, what)
            else:
                seen[conversation.id] = conversation.source
                conversations.append(conversation)
        if len(conversations) == len(picture.conversations):
            kept.append(picture)
        elif conversations:
            kept.append(replace(picture, conversations=tuple(conversations)))
    return kept
