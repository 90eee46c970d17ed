"""Detect the format of an entry of ``data.path`` from its files, unless ``data.format`` names it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.data.formats import arrow, vqa
from cogtune.data.formats.jsonfiles import LINES, numbered_lines, read_json
from cogtune.data.problems import BadRecordError, Problem
from cogtune.data.record_json import parse_json
from cogtune.language import phrase, tr
from cogtune.system.reading import open_file, read_bytes

LABEL_FOLDERS = ("labels", "labels_en", "labels_zh")
CONVERSATIONS = ("jsonl", "llava", "sharegpt", "openai")
_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "hf"}
_EXPECTED = {"csv": (".csv", ".tsv"), "parquet": (".parquet",), "coco": (".json",), "vqa": (".json",)}
_KNOWN = phrase("a folder with images/ and labels/, or a .jsonl, .json, .csv, .tsv or .parquet file")
_SNIFFED = 2**20


@dataclass(frozen=True)
class Source:
    """Files of one format below ``root``; empty for the format ``folder``."""

    form: str
    root: Path
    files: tuple[Path, ...] = ()


def find_sources(path: Path, form: str, split: str | None, notes: list[str]) -> list[Source]:
    """Find the files of ``path`` by format; ``notes`` receives a line for what is there and not read.

    Args:
        form: ``data.format``.

    Raises:
        DataError: nothing there, no known format, or another format than ``form``.
    """
    if not path.exists():
        raise Problem("no-such-path", str(path), tr("no such file or folder")).error()
    if path.is_dir():
        return _in_folder(path, form, split, notes)
    try:
        open_file(path).close()
    except OSError as error:
        raise Problem(
            "no-such-path", str(path), tr("cannot be read ({error})", error=error.strerror)
        ).error() from error
    _refuse_suffix(path, form)
    if form in ("auto", "vqa") and _is_vqa(path, form):
        return [Source("vqa", path.parent, _flat(vqa.pair_files(path)))]
    return [Source(_file_format(path, form), path.parent, (path,))]


def _refuse_suffix(path: Path, form: str) -> None:
    suffix = path.suffix.lower()
    if suffix not in (*LINES, ".json", *_SUFFIXES):
        raise Problem(
            "no-such-path", str(path), tr("a file of an unknown kind; expected was {known}", known=tr(_KNOWN))
        ).error()
    expected = (*LINES, ".json") if form in CONVERSATIONS else _EXPECTED.get(form, (suffix,))
    if form == "folder" or suffix not in expected:
        wanted = "a folder" if form == "folder" else tr("a file ending in {expected}", expected=" or ".join(expected))
        raise Problem(
            "format", str(path), tr("data.format is {form}, so {wanted} was expected", form=form, wanted=wanted)
        ).error()


def _in_folder(path: Path, form: str, split: str | None, notes: list[str]) -> list[Source]:
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
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
        return [Source("vqa", path, _flat(vqa.pair_files(path)))]
    if form == "auto":
        sources = list(_by_format(path, files, lines, notes))
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
    if form != "auto":
        return form
    suffix = file.suffix.lower()
    return _SUFFIXES.get(suffix) or sniff(file) or ("jsonl" if suffix in LINES else _unknown(file))


def _unknown(file: Path) -> str:
    read_json(file)  # a file that is not JSON has its own message
    what = tr("no known format: a list of conversations, COCO captions or VQA questions were expected")
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


def _flat(pairs: list[tuple[Path, Path]]) -> tuple[Path, ...]:
    return tuple(file for pair in pairs for file in pair)


def sniff(file: Path) -> str | None:
    """Return the format of a ``.json`` or ``.jsonl`` file from its first record, or None."""
    try:
        if file.suffix.lower() in LINES:
            line = next((line for _, line in numbered_lines(file)), b"")
            return _record_format(parse_json(line)[0]) if line.strip() else None
        with open_file(file) as stream:
            head = stream.read(_SNIFFED).decode("utf-8-sig", errors="ignore").lstrip()
        if head.startswith("["):
            return _record_format(_first_of_list(head, file))
        return _object_format(parse_json(read_bytes(file))[0]) if head.startswith("{") else None
    except (BadRecordError, OSError):
        return None


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
    return "coco" if "images" in root and "annotations" in root else None


def _record_format(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    if "messages" in record:
        messages = record["messages"] if isinstance(record["messages"], list) else []
        parts = any(isinstance(entry, dict) and isinstance(entry.get("content"), list) for entry in messages)
        return "openai" if parts else "sharegpt"
    entries = record.get("conversations")
    if isinstance(entries, list) and any(isinstance(entry, dict) and "from" in entry for entry in entries):
        return "sharegpt" if "images" in record else "llava"
    return "jsonl" if entries is not None or "captions" in record else None
