"""Read ``data.path`` into examples: detect each entry's format, name it, read it, and report what was wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.data.formats.detect import Source, find_sources
from cogtune.data.formats.item import RecordRules
from cogtune.data.grounding import Settings, convert_boxes
from cogtune.data.picture_headers import Decodes
from cogtune.data.picture_paths import Places, default_extract_dir
from cogtune.data.problems import Problem, Problems
from cogtune.data.published_layout import FolderReader
from cogtune.data.record_files import RecordsReader
from cogtune.data.record_json import shown
from cogtune.data.records import Example
from cogtune.data.report import DataReport
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.processing.frames import Sampling

if TYPE_CHECKING:
    from cogtune.configuration.input_sections import SourceSection

Done = Callable[[int, int], None]
"""Called with the number of an entry's pictures that were checked, and their total."""


@dataclass(frozen=True)
class _Entry:
    """One format found in an entry of ``data.path``."""

    source: Source
    weight: float


def read_sources(
    data: SourceSection,
    paths: Sequence[Any] | None = None,
    *,
    max_images: int = 1,
    clips: bool = False,
    open_questions: bool = False,
    choices: bool = False,
    keep_unreadable: bool = False,
) -> tuple[list[Example], DataReport]:
    """Read every folder and file of ``data.path`` (or of ``paths``), for a model of ``max_images`` images a prompt;
    ``clips``: a video model, whose records name clips.

    Entries are read in the given order; a folder's examples in the order of their names, others in that of the records.

    With ``open_questions``, as prediction asks for them, a last question needs no answer, and a folder of pictures no
    labels: each picture is asked ``data.caption_question``. ``choices`` and ``keep_unreadable``: as in `RecordRules`;
    records that are kept so are in ``report.unreadable``, and if that is all of them, they are bad.

    Raises:
        DataError: for bad input, unless ``data.on_bad`` is ``skip`` and no more than ``data.max_bad_share`` is bad.
    """
    examples, report, problems = collect_sources(
        data,
        paths,
        max_images=max_images,
        clips=clips,
        open_questions=open_questions,
        choices=choices,
        keep_unreadable=keep_unreadable,
    )
    good = sum(len(example.conversations) for example in examples) - problems.kept
    if problems.unreadable and not good:
        problems.give_up()
    report.unreadable = {images: problem.error() for images, problem in problems.unreadable.items()}
    problems.settle(good, data.on_bad, data.max_bad_share)
    return examples, report


def collect_sources(
    data: SourceSection,
    paths: Sequence[Any] | None = None,
    done: Done | None = None,
    *,
    max_images: int = 1,
    clips: bool = False,
    open_questions: bool = False,
    choices: bool = False,
    keep_unreadable: bool = False,
    decodes: Decodes | None = None,
) -> tuple[list[Example], DataReport, Problems]:
    """As `read_sources`, with what is wrong with single records returned instead of raised.

    ``decodes`` chooses pictures that are decoded, not only opened.

    Raises:
        DataError: for an entry that cannot be read at all.
    """
    report, problems = DataReport(), Problems()
    given = list(data.path if paths is None else paths)
    entries = [entry for item in given for entry in _entries(item, data, report, open_questions)]
    if not entries:
        raise DataError(tr("data.path is empty"), hint=tr("name a folder: --data DIR"), code="data-no-such-path")
    _refuse_repeats(entries)
    folders = _names([entry.source.root for entry in entries])
    files = _names([file for entry in entries for file in entry.source.files])
    places = _places(data)
    examples: list[Example] = []
    for entry in entries:
        root = entry.source.root
        common: dict[str, Any] = {
            "root": root,
            "name": folders[root],
            "split_name": _absolute(root).name,
            "weight": entry.weight,
            "max_pixels": data.max_pixels,
            "decodes": decodes,
        }
        rules = replace(
            _rules(data, max_images, open_questions, clips), choices=choices, keep_unreadable=keep_unreadable
        )
        if clips == (entry.source.form == "folder") and entry.source.form in ("folder", "clips", "prompts"):
            raise _other_kind(entry.source, clips).error()
        reader: FolderReader | RecordsReader = (
            FolderReader(labels=data.labels, rules=rules, **common)
            if entry.source.form == "folder"
            else RecordsReader(entry.source.form, entry.source.files, names=files, rules=rules, places=places, **common)
        )
        found = reader.read(problems, report, done)
        if not clips:
            before = problems.lost.total()
            found, lines, boxes = convert_boxes(found, Settings(data.boxes, data.box_form, data.exif), problems, root)
            report.notes += lines
            report.boxes += boxes
            if problems.lost.total() > before:
                report.recount(found)
        examples += found
    if data.image_root and not places.used:
        raise Problem(
            "image-root", str(data.image_root[0]), tr("data.image_root is given, and no record uses it")
        ).error()
    examples = _without_repeated_ids(_merged(examples), problems)
    report.bad, report.bad_examples = dict(problems.lost), problems.examples()
    report.exif, report.bit_depth = data.exif, data.bit_depth
    report.frames = sum(len(example.images) for example in examples) if clips else 0
    report.close(examples)
    return examples, report, problems


def _rules(data: SourceSection, max_images: int, open_questions: bool, clips: bool) -> RecordRules:
    sampling = Sampling(data.frames, data.max_frames, data.frame_rate) if clips else None
    question = data.clip_question if clips else data.caption_question
    return RecordRules(
        question,
        data.system,
        max_images,
        open_questions,
        sampling,
        data.split,
        data.labels,
        box_question=data.box_question,
    )


def _other_kind(source: Source, clips: bool) -> Problem:
    """Return the problem of a folder of pictures for a video model, or of clips for a model of pictures."""
    if clips:
        what = tr("a folder of pictures was found, and this model reads clips: videos/ with labels/*.txt, or records")
        return Problem("media-pictures", str(source.root), what)
    return Problem("media-clips", str(source.root), tr("a folder of clips, and this model reads pictures"))


def _places(data: SourceSection) -> Places:
    for root in data.image_root:
        if not root.expanduser().is_dir():
            raise Problem("image-root", str(root), tr("data.image_root names no folder")).error()
    return Places(data.image_root, (data.extract_dir or default_extract_dir()).expanduser())


def _entries(item: Any, data: SourceSection, report: DataReport, open_questions: bool) -> list[_Entry]:
    """Yield the formats found in ``item``: a path, or an object with ``path`` and ``weight``."""
    plain = isinstance(item, (str, os.PathLike))
    path, weight = (Path(item), 1.0) if plain else (Path(item.path), float(item.weight))
    try:
        sources = find_sources(path.expanduser(), data.format, data.split, report.notes, open_questions=open_questions)
    except OSError as error:
        raise Problem(
            "no-such-path", shown(str(path)), tr("cannot be read ({strerror})", strerror=error.strerror)
        ).error() from error
    return [_Entry(source, weight) for source in sources]


def _refuse_repeats(entries: Iterable[_Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        for path in entry.source.files or (entry.source.root,):
            real = os.path.realpath(path)
            if real in seen:
                raise DataError(
                    tr("{path}: named twice in data.path", path=path),
                    hint=tr("to see its records more often, give it a weight (docs/guides/data.md)"),
                    code="data-duplicate-id",
                )
            seen.add(real)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Map each path to its own name, with as many parents as needed to distinguish the paths."""
    names: dict[Path, str] = {}
    absolute = {path: _absolute(path).parts for path in paths}
    different = set(absolute.values())
    for path, parts in absolute.items():
        length = 1
        while length < len(parts) and sum(other[-length:] == parts[-length:] for other in different) > 1:
            length += 1
        names[path] = "/".join(parts[-length:])
    return names


def _merged(examples: list[Example]) -> list[Example]:
    """Join examples with the same images and weight from several records files, at the first one's place."""
    merged: dict[tuple[str, float], Example] = {}
    for example in examples:
        slot = (example.key, example.weight)
        if slot in merged and example.images:
            first = merged[slot]
            example = replace(first, conversations=first.conversations + example.conversations)
        elif slot in merged:
            slot = (f"{example.key}\0{len(merged)}", example.weight)
        merged[slot] = example
    return list(merged.values())


def _without_repeated_ids(examples: list[Example], problems: Problems) -> list[Example]:
    """Drop and report conversations whose id was used before: predictions are found by their ids."""
    seen: dict[str, str] = {}
    kept: list[Example] = []
    for example in examples:
        conversations = []
        for conversation in example.conversations:
            if conversation.id in seen:
                what = tr(
                    "the id {id} was already used in {seen}", id=shown(conversation.id), seen=seen[conversation.id]
                )
                problems.add("duplicate-id", conversation.source, what)
            else:
                seen[conversation.id] = conversation.source
                conversations.append(conversation)
        if len(conversations) == len(example.conversations):
            kept.append(example)
        elif conversations:
            kept.append(replace(example, conversations=tuple(conversations)))
    return kept
