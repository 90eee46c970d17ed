"""Times of the first hour's commands on a tiny base.

    python -m benchmarks.first_hour benchmarks/results/first-hour.json

The README's order, as a user types it, each command a process of its own: doctor, check, preview, plan, train, chat.
The base has a few hundred thousand parameters, so these are the times of the commands themselves; a real download and a
real training come on top. ``tests/integration/test_first_hour.py`` holds the same walk to its results.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cogtune.bench.data_folder import dialogue, write_folder
from cogtune.bench.report import circumstances, write_result
from cogtune.checkpoint.random import make_tiny

PICTURES, STEPS = 800, 20
_SAME = ("--model", "cogvlm2", "--data", "my-data")
WALK = (
    ("--help",),
    ("train", "--help"),
    ("doctor", "--offline"),
    ("data", "check", "my-data", "--model", "cogvlm2"),
    ("data", "preview", "my-data", "--model", "cogvlm2"),
    ("plan", *_SAME, "--card", "24GiB"),
    ("train", *_SAME, "--output", "output", "--train.max_steps", str(STEPS), "--train.batch_size", "2"),
    ("chat", "--adapter", "output/adapter", "--image", "my-data/images/0000.jpg", "--query", "What is it?",
     "--max-new-tokens", "4"),
)  # fmt: skip
"""The commands, without ``cogtune``."""


def walk(folder: Path) -> list[dict[str, Any]]:
    """Every command in ``folder``, with its seconds; one that fails ends the walk with its words."""
    make_tiny(folder / "cogvlm2")
    records = {f"{number:04}": dialogue("What is it?", f"It is number {number % 7}.") for number in range(PICTURES)}
    write_folder(folder / "my-data", records)
    rows = []
    for words in WALK:
        began, used = time.perf_counter(), _children_seconds()
        done = subprocess.run([sys.executable, "-m", "cogtune", *words], cwd=folder, capture_output=True, text=True)
        seconds, cpu = round(time.perf_counter() - began, 2), round(_children_seconds() - used, 2)
        if done.returncode:
            raise SystemExit(f"cogtune {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        rows.append({"command": " ".join(["cogtune", *words]), "seconds": seconds, "cpu_seconds": cpu})
        print(f"{seconds:6.2f} s ({cpu:6.2f} of a core)  {rows[-1]['command']}", flush=True)
    return rows


def _children_seconds() -> float:
    """Processor seconds of all commands so far, whatever else the machine did."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Walk and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_hour",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    record = circumstances(f"python -m benchmarks.first_hour {target}")
    with tempfile.TemporaryDirectory() as name:
        rows = walk(Path(name))
    total, cpu = (round(sum(row[key] for row in rows), 2) for key in ("seconds", "cpu_seconds"))
    cells = [[f"`{row['command']}`", row["seconds"], row["cpu_seconds"]] for row in rows]
    table = {"columns": ["command", "seconds", "seconds of a core"], "columns_zh": ["命令", "秒", "单核秒"],
             "rows": [*cells, ["", total, cpu]]}  # fmt: skip
    load = None if not hasattr(os, "getloadavg") else round(os.getloadavg()[0], 2)
    write_result(target, {**record, "pictures": PICTURES, "steps": STEPS, "load_after": load, "rows": rows,
                        "total_seconds": total, "total_cpu_seconds": cpu, "table": table})  # fmt: skip


if __name__ == "__main__":
    main()
