"""Predictions as a CSV or Parquet table, made of the lines of a complete predictions file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cogtune.errors import ConfigError, OutputFolderError, SetupError
from cogtune.language import tr
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.reading import read_bytes

LINES, TABLES = ".jsonl", (".csv", ".parquet")


def lines_file(output: Path) -> Path:
    """Return the file that answers go to line by line: ``output`` itself, or the JSON lines beside a table.

    Raises:
        ConfigError: the name has no ending that says what to write. SetupError: Parquet without pyarrow.
        OutputFolderError: a table that was not made of such lines.
    """
    kind = output.suffix.lower()
    if kind not in (LINES, *TABLES):
        raise ConfigError(
            tr("--output {output}: a name that ends in .jsonl, .csv or .parquet was expected", output=output),
            hint=tr("for JSON lines: --output {output}", output=output.with_suffix(LINES)),
            code="config-value",
        )
    if kind == LINES:
        return output
    if kind == ".parquet" and find_spec("pyarrow") is None:
        raise SetupError(
            tr("Parquet files are written with pyarrow, which is not installed"),
            hint=tr('install it: pip install "cogtune[data]"'),
            code="no-pyarrow",
        )
    lines = output.with_name(output.name + ".jsonl")
    if output.exists() and not lines.is_file():
        raise OutputFolderError(
            tr("{path}: exists, and {name}, which it would be made of, does not", path=output, name=lines.name),
            hint=tr("give another --output"),
        )
    return lines


def write_table(output: Path, lines: Path) -> None:
    """Write the records of ``lines`` to ``output``, whole or not at all. A predictions file that is no table stays.

    Raises:
        DiskFullError: no space.
    """
    if output == lines:
        return
    rows = [json.loads(line) for line in read_bytes(lines).splitlines()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with explained(output):
        if output.suffix.lower() == ".csv":
            files.write_text(output, _csv(names, rows))
            return
        import pyarrow
        import pyarrow.parquet

        columns = {name: _column([row.get(name) for row in rows]) for name in names}
        with files.growing(output) as growing:
            pyarrow.parquet.write_table(pyarrow.table(columns), growing)


def _csv(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    """A text as it is, nothing for null, everything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _column(values: list[Any]) -> list[Any]:
    """Values of one type: a column of texts and lists becomes one of lists."""
    if not any(isinstance(value, list) for value in values):
        return values
    return [value if value is None or isinstance(value, list) else [value] for value in values]
