"""Records in JSON: one a line, in a list, or one after another over several lines; the content says which, whatever the
suffix. In them cogtune's own records, LLaVA, ShareGPT, ms-swift, OpenAI, flat records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cogtune.data.formats.clip_records import as_pictures, refuse_clips
from cogtune.data.formats.flat import read_flat
from cogtune.data.formats.item import Content, Item, RecordRules
from cogtune.data.formats.messages import read_conversation
from cogtune.data.formats.pictures import picture_sources, refuse_unread_own
from cogtune.data.problems import BadRecordError, Problem
from cogtune.data.record_json import DECODER, identity_of, kind_of, parse_json, record_dialogues, shown
from cogtune.language import tr
from cogtune.system.reading import open_file, read_bytes

Parse = Callable[[Any], Content]
LINES = (".jsonl", ".ndjson")
_HEAD = 2**20
_BETWEEN = re.compile(rb"^\}\s*,?\s*\{", re.MULTILINE)
"""The end of one printed object and the start of the next; what lies inside them is indented."""
_SPACE = re.compile(r"[\s,]*")


def items(file: Path, form: str, rules: RecordRules) -> Iterator[Item]:
    """Yield the records of a file.

    Raises:
        DataError: a file that cannot be read, or whose root is neither a list nor a record.
    """

    def parse(record: Any) -> Content:
        if form in ("jsonl", "flat"):
            if rules.clips is None:
                refuse_clips(record)
            else:
                record = as_pictures(record)
        if form == "jsonl":
            return own_record(record, rules)
        return read_flat(record, rules, form) if form == "flat" else read_conversation(record, rules, form)

    shape = layout(file)
    if shape == "lines":
        for number, line in numbered_lines(file):
            yield Item(number, f"{file}:{number}", _parsed_later(line, parse))
        return
    if shape == "objects":
        yield from _objects(file, parse)
        return
    root, repaired = read_json(file)
    if not isinstance(root, list | dict):
        raise Problem(
            "wrong-root", str(file), tr("{kind_of} found, a list of records was expected", kind_of=kind_of(root))
        ).error()
    for number, record in enumerate([root] if isinstance(root, dict) else root, start=1):
        where = tr("{file}, record {number}", file=file, number=number)
        yield Item(number, where, _later(record, parse, repaired and number == 1))


def layout(file: Path) -> str:
    """Return how a file holds its records.

    ``lines``: one a line; ``whole``: a list, or a single value; ``objects``: one after another over several lines, as
    programs print them for people.

    Raises:
        DataError: it cannot be read.
    """
    lines = file.suffix.lower() in LINES
    try:
        with open_file(file) as stream:
            head = stream.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
            if head.startswith(b"[") or not head.startswith(b"{"):
                return "lines" if lines and not head.startswith(b"[") else "whole"
            first = head.split(b"\n", 1)[0].strip()
            if first == b"{":
                return "objects" if lines or _BETWEEN.search(head + stream.read()) else "whole"
            if lines or b"\n" not in head:
                return "lines" if lines else "whole"
            more = bool(head.split(b"\n", 1)[1].strip())
    except OSError as error:
        raise Problem("no-such-path", str(file), tr("cannot be read ({error})", error=error)).error() from error
    try:
        return "lines" if more and isinstance(parse_json(first)[0], dict) else "whole"
    except BadRecordError:
        return "whole"


def _objects(file: Path, parse: Parse) -> Iterator[Item]:
    """Yield records that stand one after another; after a damaged one nothing can be found."""
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem("bad-json", str(file), tr("not UTF-8 (byte {place})", place=error.start)).error() from error
    number, place = 0, _SPACE.match(text, 0).end()  # type: ignore[union-attr]  # it matches nothing too
    while place < len(text):
        number += 1
        where = tr("{file}, record {number}", file=file, number=number)
        try:
            record, place = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError, BadRecordError) as error:
            what = tr("not valid JSON ({error}); the records after it are not found", error=str(error))
            yield Item(number, where, partial(_refuse, what))
            return
        yield Item(number, where, _later(record, parse, repaired=False))
        place = _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _refuse(what: str) -> Content:
    raise BadRecordError("bad-json", what)


def own_record(record: Any, rules: RecordRules) -> Content:
    """Parse a record in cogtune's own form, with its ``image``."""
    dialogues = record_dialogues(
        record, rules.caption_question, open_questions=rules.open_questions, choices=rules.choices
    )
    if "image" not in record:
        raise BadRecordError("image-path", tr('the record has no "image"'))
    image = record["image"]
    if image is not None and (not isinstance(image, str)):
        raise BadRecordError("image-path", tr('"image" is {image}, a path or null was expected', image=shown(image)))
    if image is None and "captions" in record:
        raise BadRecordError("image-path", tr("a caption, and no picture"))
    refuse_unread_own(record, ("image",), () if image is None else (image,), "jsonl")
    return Content(dialogues, picture_sources((image,)), identity_of(record))


def _parsed_later(line: bytes, parse: Parse) -> Callable[[], Content]:
    def read() -> Content:
        record, repaired = parse_json(line)
        content = parse(record)
        return replace(content, repaired=repaired)

    return read


def _later(record: Any, parse: Parse, repaired: bool) -> Callable[[], Content]:
    def read() -> Content:
        content = parse(record)
        return replace(content, repaired=repaired)

    return read


def read_json(file: Path) -> tuple[Any, bool]:
    """Return ``(root, repaired)`` of a JSON file.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    try:
        return parse_json(read_bytes(file))
    except BadRecordError as bad:
        raise Problem(bad.kind, str(file), bad.what).error() from bad
    except OSError as error:
        raise Problem("no-such-path", str(file), tr("cannot be read ({error})", error=error)).error() from error


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield ``(number from 1, line)`` for every line that is not blank."""
    try:
        with open_file(file) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise Problem("no-such-path", str(file), tr("cannot be read ({error})", error=error)).error() from error
