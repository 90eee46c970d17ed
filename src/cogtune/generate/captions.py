"""Answers written back as data: the layouts that trainers of video and picture models read captions from.

| target | what is written |
| --- | --- |
| a folder | ``labels/NAME.txt`` for each clip, by its path below ``videos/`` |
| ``prompts.txt`` | one caption a line, and ``videos.txt`` beside it |
| ``*.jsonl`` | ``{"file_name", "prompt"}`` a line |
| ``*.parquet`` | columns ``file_name`` and ``prompt`` |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cogtune.data.formats.clips import FOLDER, PROMPTS, VIDEOS
from cogtune.data.records import Question, file_of
from cogtune.errors import OutputFolderError, SetupError
from cogtune.language import tr
from cogtune.system import files
from cogtune.system.file_errors import explained

Captions = Mapping[Path, str]


def captions_of(questions: Iterable[Question], answers: Mapping[int, str]) -> dict[Path, str]:
    """Return the first answer about each file, in the data's order. ``answers``: by the question's place."""
    found: dict[Path, str] = {}
    for place, question in enumerate(questions):
        if question.images and place in answers:
            found.setdefault(file_of(question.images[0]), answers[place].strip())
    return found


def write_captions(target: Path, captions: Captions) -> int:
    """Write ``captions`` to ``target``; return how many. What is there already and says the same stays.

    Raises:
        OutputFolderError: a file is there that says something else.
        SetupError: Parquet without pyarrow.
        DiskFullError: no space.
    """
    if target.suffix == ".parquet":
        return _parquet(target, captions)
    for path, text in _texts(target, captions).items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if os.path.lexists(path):
            raise OutputFolderError(
                tr("{path}: exists, with another caption", path=path),
                hint=tr("move it away, or name another target: --captions DIR"),
                code="convert-target",
            )
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, text)
    return len(captions)


def _texts(target: Path, captions: Captions) -> dict[Path, str]:
    """Return the files to write, with their content."""
    if target.name == PROMPTS:
        names = "".join(f"{_relative(clip, target.parent)}\n" for clip in captions)
        return {
            target: "".join(" ".join(text.split()) + "\n" for text in captions.values()),
            target.with_name(VIDEOS): names,
        }
    if target.suffix == ".jsonl":
        rows = [{"file_name": _relative(clip, target.parent), "prompt": text} for clip, text in captions.items()]
        return {target: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}
    return {target / "labels" / _below_videos(clip).with_suffix(".txt"): f"{text}\n" for clip, text in captions.items()}


def _below_videos(clip: Path) -> Path:
    """Return a clip's path below its ``videos`` folder, or its name."""
    parts = Path(os.path.abspath(clip)).parts
    places = [place for place, part in enumerate(parts[:-1]) if part == FOLDER]
    return Path(*parts[places[-1] + 1 :]) if places else Path(clip.name)


def _relative(clip: Path, folder: Path) -> str:
    return Path(os.path.relpath(os.path.abspath(clip), os.path.abspath(folder))).as_posix()


def _parquet(target: Path, captions: Captions) -> int:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SetupError(
            tr("Parquet files are written with pyarrow, which cannot be imported ({error})", error=error),
            hint=tr('install it: pip install "cogtune[data]"'),
            code="no-pyarrow",
        ) from error
    names = [_relative(clip, target.parent) for clip in captions]
    table = pyarrow.table({"file_name": names, "prompt": list(captions.values())})
    if target.is_file():
        if pyarrow.parquet.read_table(target).equals(table):
            return len(captions)
        raise OutputFolderError(
            tr("{path}: exists, with another caption", path=target),
            hint=tr("move it away, or name another target: --captions DIR"),
            code="convert-target",
        )
    with explained(target), files.growing(target) as growing:
        target.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, growing)
    return len(captions)
