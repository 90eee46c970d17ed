"""What `benchmarks.step_profile` printed, as a result file: where the device's time of a step goes, by kind of kernel.

    python -m benchmarks.profiled LOG --json benchmarks/results/NAME.json

A log may hold several variants. Kinds are those of ``cogtune.bench.breakdown``, by kernels' names; a matrix product
that takes less than 30 us on the average is a small one, an adapter's mostly. What the log cut off is ``not listed``.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogtune.bench.breakdown import KINDS, kind_of

_SMALL = 30.0  # us
_STEP = re.compile(r"^(?P<name>\S+) .*?(?P<found>\{'median_ms'.*\})$")
_BUSY = re.compile(r"^device busy (?P<busy>[\d.]+) ms a step, (?P<kernels>\d+) kernels$")
_KERNEL = re.compile(r"^\s*(?P<each>[\d.]+) ms\s+\d+x\s+(?P<mean>[\d.]+) us  (?P<name>.+)$")
RUN = "run: "
"""Begins the line that says on what and with what the profile was taken."""


def read(log: Path) -> dict[str, Any]:
    """The log's circumstances and, as rows, each variant whose kernels it lists."""
    record: dict[str, Any] = {}
    rows = list[dict[str, Any]]()
    step: dict[str, Any] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith(RUN) and not record:
            record = json.loads(line.removeprefix(RUN))
        elif found := _STEP.match(line):
            step = {"name": found["name"], "median_ms": ast.literal_eval(found["found"])["median_ms"]}
        elif found := _BUSY.match(line):
            busy = float(found["busy"])
            kinds = dict.fromkeys(("matmuls", "small-matmuls", "elementwise", *list(KINDS)), 0.0)
            rows.append({
                **step, "busy_ms": busy, "kernels": int(found["kernels"]), "kinds_ms": kinds,
                "between_kernels_ms": round(step["median_ms"] - busy, 3), "not_listed_ms": busy,
            })  # fmt: skip
        elif rows and (found := _KERNEL.match(line)):
            kind, each = kind_of(found["name"]), float(found["each"])
            kind = "small-matmuls" if kind == "matmuls" and float(found["mean"]) < _SMALL else kind
            rows[-1]["kinds_ms"][kind] = round(rows[-1]["kinds_ms"][kind] + each, 3)
            rows[-1]["not_listed_ms"] = round(rows[-1]["not_listed_ms"] - each, 3)
    if not record or not rows:
        raise SystemExit(
            f"{log}: no profile that says where it was taken; `python -m benchmarks.step_profile` prints one"
        )
    return {"kind": "profile", **record, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(arguments)
    given.json.write_text(json.dumps(read(given.log), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
