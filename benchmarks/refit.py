"""What the allocator leaves unused, fitted to measured rows: ``python -m benchmarks.refit FILE.json ...``.

Reads result files of `cogtune bench sweep memory`, `bench fit` and `bench train`, asks today's planner for each row's
setting, and prints plan beside measurement and the numbers of `cogtune.plan.calibration.Allocator` that fit best. Rows
of one allocator setting belong together: ``--segments`` says that the files were measured with torch's default one.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cogtune.bench.flops import Work
from cogtune.bench.models import model_config
from cogtune.bench.prediction import setting_for
from cogtune.bench.report import table
from cogtune.bench.variants import parse_variants
from cogtune.cli.options import split_arguments
from cogtune.plan.memory import FLOAT32, predict
from cogtune.plan.setting import Setting
from cogtune.plan.step import peak
from cogtune.system.byte_sizes import GIB, MIB

_SWITCHES = ("breakdown", "tiny")
_VALUES = ("preset", "features", "variant", "steps", "warmup", "rounds", "cap", "json", "rows")
_TERMS = ("share", "working", "update", "fixed")


@dataclass(frozen=True)
class Row:
    """A measured setting; sizes in GiB. ``driver`` is None where other programs were on the card as well. ``causes``:
    what `Allocator.slack` multiplies by its numbers."""

    name: str
    setting: Setting
    allocated: float
    reserved: float
    driver: float | None = None
    ms: float | None = None

    @property
    def causes(self) -> tuple[float, float, float, float]:
        moment = peak(self.setting)
        update = FLOAT32 * self.setting.adapter_parameters()
        return moment.total / GIB, moment.again / GIB, update / GIB, 1.0

    @property
    def allowed(self) -> float:
        return max(0.05 * self.reserved, 0.5)


def read(file: Path, *, expandable: bool) -> Iterator[Row]:
    """The rows of a result file that trained, without the baseline."""
    record = json.loads(file.read_text(encoding="utf-8"))
    for row in record.get("rows", []):
        if "error" in row or "tokens" not in row or row["name"].startswith("baseline"):
            continue
        words = shlex.split(row.get("command", row.get("run", record)["command"]))
        words = words[words.index("bench") + 2 :]
        if words and not words[0].startswith("-"):
            words.pop(0)  # a sweep's name
        overrides = split_arguments(words, switches=_SWITCHES, values=_VALUES).overrides
        overrides.pop("model", None)
        overrides["model.path"] = ["random"]  # the published sizes
        changes = " ".join(f"{key}={value}" for key, value in row["changes"].items())
        cached = row["features"] == "cached"
        (variant,) = parse_variants([f"{row['name']} {changes}"], overrides, preset=row["preset"], cached=cached)
        images = 0 if row["preset"] == "text-only" else row["batch_size"]
        work = Work(tokens=row["tokens"], pairs=0, labels=row["labels"], images=images, rows=row["batch_size"])
        setting = setting_for(variant, model_config("random"), work, card=record["card"], ranks=row["ranks"])
        setting = replace(setting, expandable=expandable)
        yield Row(
            row["name"],
            setting,
            row["allocated_gib"],
            row["reserved_gib"],
            row.get("driver_gib"),
            row.get("median_ms"),
        )


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Numbers, none below 0, with the least squares of what reserved is off by, in parts of what it may be off by.

    They are fitted to what the plan of allocated memory leaves, so that they make up for what that is off by too.
    """
    causes = np.array([row.causes for row in rows])
    left = np.array([row.reserved - predict(row.setting).phase("train").allocated / GIB for row in rows])
    weight = 1 / np.array([row.allowed for row in rows])
    used = list(range(len(_TERMS)))
    while True:
        found = np.linalg.lstsq(causes[:, used] * weight[:, None], left * weight, rcond=None)[0]
        if len(used) == 1 or (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    numbers = dict.fromkeys(_TERMS, 0.0)
    return numbers | {_TERMS[index]: max(float(value), 0.0) for index, value in zip(used, found, strict=True)}


def shown(rows: Sequence[Row], numbers: dict[str, float]) -> str:
    """Measured and planned, GiB, with today's numbers and with the fitted ones."""
    cells = []
    for row in rows:
        planned = predict(row.setting).phase("train")
        refitted = planned.allocated / GIB + sum(
            numbers[term] * cause for term, cause in zip(_TERMS, row.causes, strict=True)
        )
        cells.append([
            row.name, f"{row.allocated:.2f}", f"{planned.allocated / GIB:.2f}", f"{row.reserved:.2f}",
            f"{planned.reserved / GIB:.2f}", _verdict(planned.reserved / GIB, row), f"{refitted:.2f}",
            _verdict(refitted, row),
        ])  # fmt: skip
    return table(["row", "allocated", "plan", "reserved", "plan", "off", "refitted", "off"], cells)


def _verdict(said: float, row: Row) -> str:
    off = said - row.reserved
    return f"{100 * off / row.reserved:+.1f} %{'' if abs(off) <= row.allowed else ' NO'}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--segments", action="store_true", help="measured with torch's default segments")
    given = parser.parse_args(arguments)
    rows = [row for file in given.files for row in read(file, expandable=not given.segments)]
    numbers = fit(rows)
    print(shown(rows, numbers))
    name = "SEGMENTS" if given.segments else "EXPANDABLE"
    print(f"\n{name} = Allocator(share={numbers['share']:.3f}, working={numbers['working']:.2f}, "
          f"update={numbers['update']:.1f}, fixed={numbers['fixed'] * GIB / MIB:.0f} * MIB, ...)")  # fmt: skip
    return numbers


if __name__ == "__main__":
    main()
