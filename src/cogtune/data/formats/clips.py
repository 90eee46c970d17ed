"""Data of clips: folders as CogVideoX reads them, MSR-VTT and VATEX.

A clip takes the place of a record's pictures: whoever takes a record looks its file up, and chooses the frames.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cogtune.data.formats.item import Content, Item, RecordRules
from cogtune.data.formats.jsonfiles import read_json
from cogtune.data.problems import BadRecordError, Problem
from cogtune.data.record_json import checked_text, shown
from cogtune.data.records import Turn
from cogtune.language import tr
from cogtune.processing.clip import SUFFIXES, is_clip
from cogtune.system.names import is_unicode

FOLDER = "videos"
PROMPTS, VIDEOS = "prompts.txt", "videos.txt"
_PLACES = ("{}.mp4", "videos/{}.mp4", "{}.mkv", "videos/{}.mkv", "{}.webm", "videos/{}.webm", "TrainValVideo/{}.mp4")


def has_clips(folder: Path) -> bool:
    """Return whether clips lie directly in a folder."""
    with os.scandir(folder) as entries:
        return any(is_clip(entry.name) and entry.is_file() for entry in entries)


def labelled(folder: Path, rules: RecordRules) -> Iterator[Item]:
    """Yield the clips below ``folder`` (any depth) with the caption of ``labels/<same path>.txt`` beside it.

    Where ``folder`` is not called ``videos``, captions lie beside their clips. Without any, questions stay open.
    """
    labels = folder.with_name("labels") if folder.name == FOLDER else folder
    open_only = rules.open_questions and not (labels.is_dir() and any(labels.rglob("*.txt")))
    number = 0
    for path in sorted(_files(folder)):
        if not is_clip(path.name):
            continue
        number += 1
        relative = path.relative_to(folder)
        label = None if open_only else (labels / relative).with_suffix(".txt")
        name = path.relative_to(folder.parent).as_posix()
        yield Item(number, str(path), _later_text(name, relative.with_suffix("").as_posix(), label, rules))
    if open_only or not labels.is_dir():
        return
    for label in sorted(_files(labels)):
        relative = label.relative_to(labels).with_suffix("")
        if label.suffix == ".txt" and not any((folder / relative).with_suffix(suffix).exists() for suffix in SUFFIXES):
            number += 1
            what = tr("no clip of this name in {folder}", folder=folder)
            yield Item(number, str(label), _raising("clip-missing", what))


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _later_text(name: str, identity: str, label: Path | None, rules: RecordRules) -> Callable[[], Content]:
    def read() -> Content:
        if not is_unicode(name):
            raise BadRecordError("name", tr("the file's name is not UTF-8"))
        caption = None
        if label is not None:
            try:
                caption = label.read_text(encoding="utf-8-sig").strip()
            except FileNotFoundError:
                if not rules.open_questions:
                    raise BadRecordError("label-missing", tr("no label {label}", label=label)) from None
            except (OSError, UnicodeDecodeError) as error:
                what = tr("{label} cannot be read ({error})", label=label, error=error)
                raise BadRecordError("content", what) from error
        return _captioned(name, caption, identity, rules)

    return read


def _raising(kind: str, what: str) -> Callable[[], Content]:
    def read() -> Content:
        raise BadRecordError(kind, what)

    return read


def _captioned(clip: Any, caption: Any, identity: str | None, rules: RecordRules) -> Content:
    if not rules.caption_question:
        raise BadRecordError("caption-question", tr("captions, and data.clip_question is empty"))
    texts = caption if isinstance(caption, list) else [caption]
    if rules.open_questions:
        texts = texts[:1]
    if not texts:
        raise BadRecordError("content", tr("the list of captions is empty"))
    answers = ["" if rules.open_questions and not text else checked_text(text, tr("the caption")) for text in texts]
    places = clip if isinstance(clip, tuple) else checked_text(clip, tr("the clip's name"))
    return Content([(Turn(rules.caption_question, answer),) for answer in answers], (places,), identity)


def prompts(folder: Path, rules: RecordRules) -> Iterator[Item]:
    """Yield the lines of ``videos.txt``, each with the line of ``prompts.txt`` of the same number.

    Raises:
        DataError: the files have different numbers of lines, or one cannot be read.
    """
    named = _lines(folder / VIDEOS)
    texts: list[str] | None = None
    if (folder / PROMPTS).is_file() or not rules.open_questions:
        texts = _lines(folder / PROMPTS)
        if len(texts) != len(named):
            what = tr("{clips} lines in {videos}, {texts} in {prompts}", clips=len(named), videos=VIDEOS,
                      texts=len(texts), prompts=PROMPTS)  # fmt: skip
            raise Problem("table", str(folder), what).error()
    for number, name in enumerate(named, start=1):
        text = None if texts is None else texts[number - 1]
        yield Item(number, f"{folder / VIDEOS}:{number}", _later_row(name, text, None, rules))


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Problem("no-such-path", str(file), tr("cannot be read ({error})", error=error)).error() from error
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.strip() for line in lines]


def _later_row(clip: Any, caption: Any, identity: str | None, rules: RecordRules) -> Callable[[], Content]:
    return lambda: _captioned(clip, caption, identity, rules)


def msrvtt(file: Path, rules: RecordRules) -> Iterator[Item]:
    """Yield MSR-VTT's clips, each with all its sentences.

    Raises:
        DataError: several splits and none chosen, or no such split.
    """
    root, _ = read_json(file)
    videos = [entry for entry in root.get("videos", []) if isinstance(entry, dict) and "video_id" in entry]
    splits = list(dict.fromkeys(str(entry["split"]) for entry in videos if "split" in entry))
    chosen = rules.split
    if (chosen is None and len(splits) > 1) or (chosen is not None and chosen not in splits):
        what = tr("the splits are {splits}", splits=tr(", ").join(splits) or tr("none"))
        raise Problem("split-choice", str(file), what).error()
    sentences: dict[str, list[Any]] = {}
    for sentence in root.get("sentences", []):
        if isinstance(sentence, dict):
            sentences.setdefault(str(sentence.get("video_id")), []).append(sentence.get("caption"))
    for number, entry in enumerate(videos, start=1):
        name = str(entry["video_id"])
        if chosen is None or entry.get("split") == chosen:
            where = tr("{file}, {name}", file=file, name=name)
            yield Item(number, where, _later_row(_candidates(name), sentences.get(name, []), name, rules))


def vatex(file: Path, rules: RecordRules) -> Iterator[Item]:
    """Yield VATEX's clips with their ten captions: English, or with ``data.labels: labels_zh`` Chinese."""
    root, _ = read_json(file)
    key = "chCap" if rules.labels == "labels_zh" else "enCap"
    for number, record in enumerate(root, start=1):
        name = record.get("videoID") if isinstance(record, dict) else None
        if not isinstance(name, str):
            read = _raising("id", tr('"videoID" is {value}', value=shown(name)))
        else:
            read = _later_row(_candidates(name), record.get(key, []), name, rules)
        yield Item(number, tr("{file}, record {number}", file=file, number=number), read)


def _candidates(name: str) -> tuple[str, ...]:
    return tuple(place.format(name) for place in _PLACES)
