"""Compares today's tree with the record on one card, in under nine minutes: ``python -m benchmarks.check``.

It runs the rows of ``results/record.json`` again, each group of them in a process of its own, prints each beside the
last entry that this kind of card has there, and says which ones moved. ``--json FILE`` keeps what was measured.

A training row has moved if it differs by more than `TRAINING` after the baseline's own difference is taken out: cards
and hosts of one kind differ by several percent, and the stand-in of the published computation, which never changes,
shows by how much. Decoding is bandwidth-bound and has no such row: `DECODING` allows for the card.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.bench.report import Results, table

RECORD = Path(__file__).parent / "results" / "record.json"
TRAINING, DECODING = 0.03, 0.05
_TRAIN = ("train", "--model", "random", "--steps", "12", "--warmup", "3")
_EXPERTS = "lora.targets=experts lora.rank=16"
_FP8 = "quant.experts=fp8 quant.fp8_layouts=two"
_NF4 = "features=cached quant.experts=nf4 quant.embedding=host train.gradient_checkpointing=all"
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "baseline": (*_TRAIN[:3], "--steps", "5", "--warmup", "1", "--variant", "baseline"),
    "steps": (
        *_TRAIN, "--variant", "live", "--variant", "cached features=cached",
        "--variant", f"rank16 features=cached {_EXPERTS}",
        "--variant", f"fp8-cached features=cached {_FP8}", "--variant", f"fp8-live {_FP8} quant.tower=fp8",
        "--variant", f"nf4 {_NF4}", "--variant", f"nf4-streamed {_NF4} quant.stream=0",
    ),
    "decode": ("decode", "--model", "random", "--tokens", "32", "--rows", "1,16,64"),
}  # fmt: skip
"""Arguments of ``cogtune bench`` for each group of rows."""


@dataclass(frozen=True)
class Row:
    """One row: what it takes now and what the record says. ``ms``: of a step; decode rows are steps too."""

    name: str
    ms: float
    spread: float
    recorded: float | None

    def moved(self, drift: float) -> float | None:
        """Return the change beyond the card's own ``drift`` (a factor), if it is one. Positive is slower."""
        if self.recorded is None or self.name == "baseline":
            return None
        decodes = self.name.startswith("engine")
        change = self.ms / self.recorded / (1.0 if decodes else drift) - 1
        return change if abs(change) > (DECODING if decodes else TRAINING) else None


def compare(measured: Sequence[Mapping[str, Any]], record: Sequence[Mapping[str, Any]], card: str) -> list[Row]:
    """Return each measured row beside the record's last entry for it on this kind of card."""
    last = {entry["row"]: entry["ms"] for entry in record if entry["card"] == card}
    rows = []
    for row in measured:
        if "error" in row or row["name"] == "generate()":
            continue
        ms = row.get("median_ms", row.get("step_ms"))
        spread = (row.get("max_ms", ms) - row.get("min_ms", ms)) / ms
        rows.append(Row(row["name"], ms, spread, last.get(row["name"])))
    return rows


def report(rows: Sequence[Row], failed: Sequence[Mapping[str, Any]]) -> str:
    """Format the comparison, and name what moved and what failed."""
    anchor = next((row for row in rows if row.name == "baseline"), None)
    drift = 1.0 if anchor is None or anchor.recorded is None else anchor.ms / anchor.recorded
    cells, moved = [], []
    for row in rows:
        change = row.moved(drift)
        said = "no record on this card" if row.recorded is None else "" if change is None else f"moved {change:+.1%}"
        moved += [row.name] if change is not None else []
        recorded = None if row.recorded is None else f"{row.recorded:.2f}"
        cells.append([row.name, f"{row.ms:.2f}", recorded, f"{row.spread:.0%}", said])
    lines = [table(["row", "ms", "record", "spread", ""], cells)]
    if anchor is not None and anchor.recorded is not None:
        lines.append(f"this card and host take {drift - 1:+.1%} on the baseline; taken out of the training rows")
    lines.append(f"moved: {', '.join(moved)}" if moved else "nothing moved")
    lines += [f"failed: {row['name']}: {row['error']}" for row in failed]
    return "\n".join(lines)


def _run(arguments: Sequence[str], file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "cogtune", "bench", *arguments, "--json", str(file)]
    if subprocess.run(command, check=False).returncode != 0 and not file.is_file():
        return {"rows": [{"name": arguments[0], "error": "it ended without a row; its messages are above"}]}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was measured")
    parser.add_argument("--only", choices=list(COMMANDS), action="append", help="only these groups of rows")
    given = parser.parse_args(arguments)
    results, card = Results("check", "python -m benchmarks.check", given.json), ""
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only or COMMANDS:
            found = _run(COMMANDS[name], Path(folder) / f"{name}.json")
            card = found.get("card") or card
            for row in found["rows"]:
                results.add(row)
    record = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    failed = [row for row in results.rows if "error" in row]
    rows = compare(results.rows, record, card)
    print(report(rows, failed))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
