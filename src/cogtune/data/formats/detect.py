"""Detect the format of an entry of ``data.path`` from its files, unless ``data.format`` names it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from cogtune.data.formats import arrow, clips, vqa
from cogtune.data.formats.flat import ANSWERS, CAPTIONS, PICTURES, QUESTIONS, is_flat
from cogtune.data.formats.jsonfiles import LINES, layout, numbered_lines, read_json
from cogtune.data.formats.pictures import keys_text
from cogtune.data.problems import BadRecordError, Problem
from cogtune.data.record_json import DECODER, parse_json
from cogtune.errors import DataError
from cogtune.language import phrase, tr
from cogtune.system.names import is_unicode
from cogtune.system.reading import open_file, read_bytes

LABEL_FOLDERS = ("labels", "labels_en", "labels_zh")
CONVERSATIONS = ("jsonl", "llava", "sharegpt", "openai", "flat")
_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "hf"}
_EXPECTED = {
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "coco": (".json",),
    "vqa": (".json",),
    "clips": (".json",),
}
_KNOWN = phrase("a folder with images/ and labels/, or a .jsonl, .json, .csv, .tsv or .parquet file")
_SNIFFED = 2**20
_TRIED = 20  # lines in which a record of a known format is looked for


@dataclass(frozen=True)
class Source:
    """Files of one format below ``root``; empty for the format ``folder``."""

    form: str
    root: Path
    files: tuple[Path, ...] = ()


def find_sources(
    path: Path, form: str, split: str | None, notes: list[str], *, open_questions: bool = False
) -> list[Source]:
    """Find the files of ``path`` by format; ``notes`` receives a line for what is there and not read.

    Args:
        form: ``data.format``.
        open_questions: VQA questions need no annotations file.

    Raises:
        DataError: nothing there, no known format, or another format than ``form``.
    """
    if not path.exists():
        raise Problem("no-such-path", str(path), tr("no such file or folder")).error()
    if path.is_dir():
        return _in_folder(path, form, split, notes, open_questions)
    try:
        open_file(path).close()
    except OSError as error:
        raise Problem(
            "no-such-path", str(path), tr("cannot be read ({error})", error=error.strerror)
        ).error() from error
    _refuse_suffix(path, form)
    if form in ("auto", "vqa") and _is_vqa(path, form):
        return [Source("vqa", path.parent, vqa.question_files(path, open_questions=open_questions))]
    return [Source(_file_format(path, form), path.parent, (path,))]


def _refuse_suffix(path: Path, form: str) -> None:
    suffix = path.suffix.lower()
    if suffix not in (*LINES, ".json", *_SUFFIXES):
        raise Problem(
            "no-such-path", str(path), tr("a file of an unknown kind; expected was {known}", known=tr(_KNOWN))
        ).error()
    expected = (*LINES, ".json") if form in CONVERSATIONS else _EXPECTED.get(form, (suffix,))
    if form == "folder" or suffix not in expected:
        wanted = (
            tr("a folder") if form == "folder" else tr("a file ending in {expected}", expected=" or ".join(expected))
        )
        raise Problem(
            "format", str(path), tr("data.format is {form}, so {wanted} was expected", form=form, wanted=wanted)
        ).error()


def _in_folder(path: Path, form: str, split: str | None, notes: list[str], open_questions: bool) -> list[Source]:
    if form in ("auto", "clips") and (path / clips.VIDEOS).is_file():
        return [Source("prompts", path, (path / clips.VIDEOS,))]
    videos = path / clips.FOLDER
    if form == "clips" or (form == "auto" and videos.is_dir() and (path / "labels").is_dir() and not _has_images(path)):
        return [Source("clips", path, (videos if videos.is_dir() else path,))]
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    odd = next((file for file in files if not is_unicode(file.name)), None)
    if odd is not None:
        raise Problem("name", ascii(str(odd)), tr("the file's name is not UTF-8")).error()
    lines = [file for file in files if file.suffix.lower() in LINES]
    labelled = any((path / name).is_dir() for name in LABEL_FOLDERS)
    if form == "folder" or (form == "auto" and labelled):
        if lines:
            notes.append(
                tr(
                    "{path} has label folders: its .jsonl files are not read ({name}, ...)",
                    path=path,
                    name=lines[0].name,
                )
            )
        return [Source("folder", path)]
    if form == "hf" or (form == "auto" and not lines and _is_saved(path)):
        chosen, note = arrow.split_files(path, split)
        notes += [note] if note else []
        if not chosen:
            raise Problem("no-records", str(path), tr("no .arrow or .parquet file in it")).error()
        return [Source("hf", path, tuple(chosen))]
    if form == "vqa" or (form == "auto" and not lines and _has_vqa(files)):
        return [Source("vqa", path, vqa.question_files(path, open_questions=open_questions))]
    if form == "auto":
        sources = list(_by_format(path, files, lines, notes))
        if not sources and not _has_images(path) and (videos.is_dir() or clips.has_clips(path)):
            return [Source("clips", path, (videos if videos.is_dir() else path,))]
        return sources or [Source("folder", path)]
    suffixes = (*LINES, ".json") if form in CONVERSATIONS else _EXPECTED[form]
    fitting = tuple(file for file in files if file.suffix.lower() in suffixes)
    if not fitting:
        raise Problem(
            "format",
            str(path),
            tr("data.format is {form}, and no file ends in {suffixes}", form=form, suffixes=" or ".join(suffixes)),
        ).error()
    return [Source(form, path, fitting)]


def _has_images(path: Path) -> bool:
    return (path / "images").is_dir()


def _by_format(path: Path, files: list[Path], lines: list[Path], notes: list[str]) -> Iterator[Source]:
    """Yield JSON lines if there are any; else JSON files that hold data; else tables."""
    chosen = lines
    if not chosen:
        chosen = [file for file in files if file.suffix.lower() == ".json" and sniff(file) is not None]
    if not chosen:
        chosen = [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    others = [file for file in files if file not in chosen and file.suffix.lower() in (".json", ".csv", ".tsv")]
    if chosen and others:
        notes.append(
            tr(
                "{path}: {name} is read, not {others}",
                path=path,
                name=chosen[0].name,
                others=", ".join(file.name for file in others[:3]),
            )
        )
    by_format: dict[str, list[Path]] = {}
    for file in chosen:
        by_format.setdefault(_file_format(file, "auto"), []).append(file)
    yield from (Source(name, path, tuple(found)) for name, found in by_format.items())


def _file_format(file: Path, form: str) -> str:
    if form == "clips":
        found = sniff(file)
        return found if found in ("msrvtt", "vatex") else _unknown(file)
    if form != "auto":
        return form
    return _SUFFIXES.get(file.suffix.lower()) or sniff(file) or _unknown(file)


def _unknown(file: Path) -> str:
    """Return cogtune's own format for lines of which none can be parsed, so that each is reported.

    Raises:
        DataError: the records, or the file, have no known format.
    """
    shape = layout(file)
    found = next(_heads(file, shape), None) if shape != "whole" else read_json(file)[0]
    found = found[0] if isinstance(found, list) and found else found
    if found is None or (shape == "lines" and not isinstance(found, dict)):
        return "jsonl"
    if not isinstance(found, dict):
        what = tr("no known format: a list of conversations, COCO captions or VQA questions were expected")
        raise Problem("format", str(file), what).error()
    known = {"conversations", "messages", *PICTURES, *QUESTIONS, *ANSWERS, *CAPTIONS}
    near = {key: get_close_matches(str(key).lower(), known, n=1, cutoff=0.7) for key in list(found)[:20]}
    meant = [f"{names[0]} ({key!s:.40})" for key, names in near.items() if names]
    what = tr(
        "no known format: the first record has the keys {keys}; conversations, messages, or a question and its answer"
        " were expected",
        keys=f"{keys_text(found):.200}",
    )
    if meant:
        what += tr("; near to what is there: {keys}", keys=tr(", ").join(meant))
    raise Problem("format", str(file), what).error()


def _is_saved(path: Path) -> bool:
    """Return whether a folder is a Hugging Face data set: written by ``save_to_disk``, or Parquet files."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return True
    return any(next(path.glob(pattern), None) for pattern in ("*.parquet", "data/*.parquet", "*.arrow"))


def _has_vqa(files: Iterable[Path]) -> bool:
    return any("question" in file.name.lower() and _is_vqa(file, "auto") for file in files if file.suffix == ".json")


def _is_vqa(file: Path, form: str) -> bool:
    return form == "vqa" or (file.suffix.lower() == ".json" and sniff(file) == "vqa")


def sniff(file: Path) -> str | None:
    """Return the format of a ``.json`` or ``.jsonl`` file from its first record, or None."""
    try:
        shape = layout(file)
        if shape != "whole":
            return next(filter(None, map(_record_format, _heads(file, shape))), None)
        with open_file(file) as stream:
            head = stream.read(_SNIFFED).decode("utf-8-sig", errors="ignore").lstrip()
        if head.startswith("["):
            return _record_format(_first_of_list(head, file))
        return _object_format(parse_json(read_bytes(file))[0]) if head.startswith("{") else None
    except (BadRecordError, DataError, OSError):
        return None


def _heads(file: Path, shape: str) -> Iterator[Any]:
    """Yield the first records that can be parsed."""
    if shape == "objects":
        with contextlib.suppress(ValueError, RecursionError, BadRecordError, OSError):
            yield DECODER.raw_decode(read_bytes(file).decode("utf-8-sig").lstrip())[0]
        return
    for _, line in islice(numbered_lines(file), _TRIED):
        with contextlib.suppress(BadRecordError):
            yield parse_json(line)[0]


def _first_of_list(head: str, file: Path) -> Any:
    """Return the first record of a list; such files are large, so the rest is not parsed if possible."""
    try:
        return json.JSONDecoder().raw_decode(head[1:].lstrip())[0]
    except (ValueError, RecursionError):
        root, _ = parse_json(read_bytes(file))
        return root[0] if root else None


def _object_format(root: Any) -> str | None:
    def first(key: str) -> dict[str, Any]:
        entries = root.get(key)
        return entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}

    if "question_id" in first("questions") or "question_id" in first("annotations"):
        return "vqa"
    if not isinstance(root, dict):
        return None
    if "video_id" in first("videos"):
        return "msrvtt"
    return "coco" if "file_name" in first("images") or "image_id" in first("annotations") else _record_format(root)


def _record_format(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    if "videoID" in record:
        return "vatex"
    if "messages" in record:
        messages = record["messages"] if isinstance(record["messages"], list) else []
        parts = any(isinstance(entry, dict) and isinstance(entry.get("content"), list) for entry in messages)
        return "openai" if parts else "sharegpt"
    entries = record.get("conversations")
    if isinstance(entries, list) and any(isinstance(entry, dict) and "from" in entry for entry in entries):
        return "sharegpt" if {"images", "videos"} & record.keys() else "llava"
    captions = record.get("captions")
    if entries is not None or (isinstance(captions, list) and any(isinstance(one, dict) for one in captions)):
        return "jsonl"
    return "flat" if is_flat({str(key).lower() for key in record}) else None
