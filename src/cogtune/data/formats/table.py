"""CSV and TSV with a header: the columns of flat records, such as ``image,question,answer`` or ``image,caption``."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cogtune.data.formats.clip_records import columns
from cogtune.data.formats.flat import PICTURES, missing, read_flat
from cogtune.data.formats.item import Content, Item, RecordRules
from cogtune.data.problems import BadRecordError, Problem
from cogtune.language import tr
from cogtune.system.reading import read_bytes

TEXT_ONLY = "null"
_LARGEST_CELL = 2**27


def items(file: Path, rules: RecordRules) -> Iterator[Item]:
    """Yield one record per row. Rows are numbered as lines of the file; the header is line 1.

    Raises:
        DataError: the file is not UTF-8, or its header lacks a column.
    """
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = tr("not UTF-8 (byte {start}); spreadsheets export it as `CSV UTF-8`", start=error.start)
        raise Problem("table-encoding", str(file), what).error() from error
    except OSError as error:
        raise Problem("no-such-path", str(file), tr("cannot be read ({error})", error=error)).error() from error
    delimiter = _delimiter(file, text)
    csv.field_size_limit(_LARGEST_CELL)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        header = columns(header, str(file), clips=rules.clips is not None)
        check_columns(header, str(file), rules.open_questions)
        while True:
            line = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if any(cell.strip() for cell in row):
                yield Item(line, f"{file}:{line}", _later(header, row, rules))
    except csv.Error as error:
        raise Problem(
            "table", str(file), tr("line {line_num}: {error}", line_num=rows.line_num, error=error)
        ).error() from error


def check_columns(header: list[str], where: str, open_questions: bool) -> None:
    """Raise if the header lacks a required column.

    Raises:
        DataError: ``data-columns``, with the columns found.
    """
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise Problem(
            "columns", where, tr("the column {repeated} stands there twice", repeated=", ".join(repeated))
        ).error()
    if not any(name in header for name in PICTURES) or missing(header, open_questions=open_questions):
        found = ", ".join(name for name in header if name) or "none"
        raise Problem(
            "columns", where, tr("the columns image, question, answer were expected; found: {found}", found=found)
        ).error()


def _delimiter(file: Path, text: str) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    header = text.split("\n", 1)[0]
    return max(",\t;", key=header.count)


def _later(header: list[str], row: list[str], rules: RecordRules) -> Callable[[], Content]:
    def read() -> Content:
        if len(row) != len(header):
            what = tr(
                "{row} cells, the header has {header} columns; a cell with the delimiter needs quotes",
                row=len(row),
                header=len(header),
            )
            raise BadRecordError("table", what)
        return row_content(dict(zip(header, row, strict=True)), rules)

    return read


def row_content(row: Mapping[str, str], rules: RecordRules) -> Content:
    """Build the record of one row."""
    names = [name for name in PICTURES if name in row]
    cells = {name: row[name].strip() for name in names}
    if not any(cells.values()):
        name = tr(", ").join(names)
        what = tr("the cell {name} is empty; a text-only row says {word}", name=name, word=TEXT_ONLY)
        raise BadRecordError("image-path", what)
    pictures = {name: None if cell in ("", TEXT_ONLY) else cell for name, cell in cells.items()}
    return read_flat({**row, **pictures}, rules, "csv")
