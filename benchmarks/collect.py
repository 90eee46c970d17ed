"""Result files from several measurements of one kind, a row's newest run counting:
``python -m benchmarks.collect fit benchmarks/results/fit-h100.json FILE ...`` for files of ``cogtune bench fit``;
``... launches benchmarks/results/launches-h100.json FILE ...`` for files of ``cogtune bench train``, a launch of one
engine each.

Every row keeps the date, commit and command of its own run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogtune.bench.card_memory import ROWS

_RUN = ("date", "commit", "command", "card", "cards", "machine", "versions")


def collect(kind: str, files: Sequence[Path]) -> dict[str, Any]:
    """The joined content: rows by name (``fit``) or by engine and name (``launches``), and the runs they are from."""
    contents = sorted((json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda found: found["date"])
    rows: dict[str, dict[str, Any]] = {}
    for content in contents:
        for row in content["rows"]:
            if "error" in row:
                continue
            engine = "" if kind == "fit" else str(row.get("engine", "single")).partition(":")[0]
            name = f"{engine} {row['name']}".strip()
            rows[name] = row | {"engine_name": engine or None, "run": {key: content.get(key) for key in _RUN}}
    if kind == "fit":
        rows = {name: rows[name] for name in ROWS if name in rows}
    used = {json.dumps(row["run"]) for row in rows.values()}
    runs = [run for run in ({key: content.get(key) for key in _RUN} for content in contents) if json.dumps(run) in used]
    return {"kind": kind, **runs[-1], "runs": runs, "rows": list(rows.values())}


def main() -> None:
    kind, output, *files = sys.argv[1:]
    if kind not in ("fit", "launches") or not files:
        raise SystemExit(__doc__)
    content = collect(kind, [Path(file) for file in files])
    Path(output).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
