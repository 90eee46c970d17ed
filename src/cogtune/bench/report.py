"""The facts every measurement records, its table, and its result file, which is written row by row."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import cogtune
from cogtune.errors import OutputFolderError
from cogtune.language import tr
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.machine import commit, cores, versions

_LIBRARIES = ("transformers", "peft", "bitsandbytes", "triton", "deepspeed", "safetensors", "numpy")


def circumstances(command: str) -> dict[str, Any]:
    """Return command, date, commit, card and versions."""
    own = {"cogtune": cogtune.__version__, "python": platform.python_version()}
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cards": torch.cuda.device_count(),
        "machine": f"{platform.machine()}, {cores()} cores",
        "versions": {**own, "torch": torch.__version__, "cuda": torch.version.cuda, **versions(_LIBRARIES)},
    }


def shown_command(words: Sequence[str]) -> str:
    """Return a command without local details: no result file, and only the last name of a local folder."""
    kept, rest = list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if word == "--json":
            del rest[:1]
        elif not word.startswith("--json="):
            shown = Path(word).name if word.startswith(("/", "~", "./", "../")) else word
            kept.append(f'"{shown}"' if " " in shown else shown)
    return " ".join(kept)


def write_result(file: Path, record: Mapping[str, Any]) -> None:
    """Write a result file atomically."""
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, record)


def _require_own(file: Path) -> None:
    """Refuse to overwrite anything but an earlier result."""
    try:
        content = file.read_bytes() if file.is_file() else b""
        own = not content.strip() or "kind" in json.loads(content)
    except (OSError, ValueError, TypeError, RecursionError):
        own = False
    if not own:
        raise OutputFolderError(
            tr("{file}: exists, and is not a result file", file=file), hint=tr("name another with --json")
        )


class Results:
    """Rows of one measurement. The file, if any, is complete after every row, so an interrupted run keeps its rows."""

    def __init__(self, kind: str, command: str, file: Path | None) -> None:
        if file is not None:
            _require_own(file)
        self.record: dict[str, Any] = {"kind": kind, **circumstances(command), "rows": []}
        self._file = file

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.record["rows"]
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, or replace the row with the same name."""
        places = [index for index, other in enumerate(self.rows) if other["name"] == row["name"]]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        self.write()

    def write(self) -> None:
        if self._file is None:
            return
        write_result(self._file, self.record)

    def line(self) -> str:
        """Return everything as one line of JSON."""
        return json.dumps(self.record)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format plain text columns: the first aligned left, numbers right, ``-`` for a missing value."""
    cells = [
        [str(column) for column in columns],
        *[["-" if cell is None else str(cell) for cell in row] for row in rows],
    ]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = []
    for row in cells:
        padded = [
            row[0].ljust(widths[0]),
            *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)],
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
