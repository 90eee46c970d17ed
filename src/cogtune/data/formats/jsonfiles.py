"""JSON lines and JSON lists of conversations: cogtune's own records, LLaVA, ShareGPT, ms-swift, OpenAI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogtune.data.formats.item import Content, Item, RecordRules
from cogtune.data.formats.messages import read_conversation
from cogtune.data.formats.pictures import picture_sources, refuse_unread_own
from cogtune.data.problems import BadRecordError, Problem
from cogtune.data.record_json import identity_of, kind_of, parse_json, record_dialogues, shown
from cogtune.language import tr
from cogtune.system.reading import open_file, read_bytes

Parse = Callable[[Any], Content]
LINES = (".jsonl", ".ndjson")


def items(file: Path, form: str, rules: RecordRules) -> Iterator[Item]:
    """Yield the records of a ``.jsonl`` file, or of a ``.json`` file with a list.

    Raises:
        DataError: a file that cannot be read, or whose root is no list.
    """

    def parse(record: Any) -> Content:
        return own_record(record, rules) if form == "jsonl" else read_conversation(record, rules, form)

    if file.suffix.lower() in LINES:
        for number, line in numbered_lines(file):
            yield Item(number, f"{file}:{number}", _parsed_later(line, parse))
        return
    root, repaired = read_json(file)
    if not isinstance(root, list):
        raise Problem(
            "wrong-root", str(file), tr("{kind_of} found, a list of records was expected", kind_of=kind_of(root))
        ).error()
    for number, record in enumerate(root, start=1):
        yield Item(number, f"{file}, record {number}", _later(record, parse, repaired and number == 1))


def own_record(record: Any, rules: RecordRules) -> Content:
    """Parse a record in cogtune's own form, with its ``image``."""
    dialogues = record_dialogues(record, rules.caption_question, open_questions=rules.open_questions)
    if "image" not in record:
        raise BadRecordError("image-path", tr('the record has no "image"'))
    image = record["image"]
    if image is not None and (not isinstance(image, str)):
        raise BadRecordError("image-path", tr('"image" is {image}, a path or null was expected', image=shown(image)))
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
