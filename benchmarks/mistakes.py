"""Every mistake the command line explains and its message in both languages: ``python -m benchmarks.mistakes``.

The cases are those of ``tests/support/bad_inputs.py``; each is a test. Writes ``benchmarks/results/mistakes.json``.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import main as command_line
from cogtune.errors import LANGUAGE_VARIABLE
from tests.support.bad_inputs import CASES, make_place

RESULTS = Path(__file__).parent / "results" / "mistakes.json"
_STARTS = {"en": "error[", "zh": "错误["}


def messages(folder: Path) -> list[dict[str, Any]]:
    """Exit code and message of every case in both languages, with this machine's folders left out."""
    base, found = make_tiny(folder / "checkpoint"), []
    for number, case in enumerate(CASES):
        place = make_place(folder / f"case-{number}", base)
        arguments = case.prepare(place)
        row: dict[str, Any] = {"mistake": case.name}
        for language, start in _STARTS.items():
            os.environ[LANGUAGE_VARIABLE] = language
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                row["exit code"] = command_line(arguments)
            text = said.getvalue()
            text = text[max(text.find(start), 0) :].strip()
            for private, shown in ((f"{folder}/case-{number}/", ""), (str(folder), "..."), (sys.executable, "python")):
                text = text.replace(private, shown)
            row[language] = text
        found.append(row)
        print(f"{number + 1} of {len(CASES)}: {case.name}", flush=True)
    return found


def main() -> None:
    """Make every mistake and write what was said."""
    with tempfile.TemporaryDirectory() as name:
        rows = messages(Path(name))
    record = {
        "command": "python -m benchmarks.mistakes",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
