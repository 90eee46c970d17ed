"""From data to a merged model on a card of 24 GiB, as the README orders it: ``python -m benchmarks.walk``.

Every command is a process of its own, on the demo's tiny base and its kind of pictures. What they print is the result:
``benchmarks/results/walk-24gb.json``, shown by ``benchmarks/walk.md``. The card is the planner's; the commands compute
on what is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cogtune.bench.data_folder import dialogue, write_folder
from cogtune.bench.report import circumstances, write_result
from cogtune.demo.base import BASE

RESULT = Path(__file__).parent / "results" / "walk-24gb.json"
PICTURE = "my-data/images/0001.jpg"
WALK = (
    ("data", "check", "my-data", "--model", "cogvlm2"),
    ("init", "my-data", "--model", "cogvlm2", "--card", "24GiB", "--output", "run.yaml"),
    ("plan", "run.yaml", "--card", "24GiB"),
    ("train", "run.yaml", "--train.epochs", "1"),
    ("chat", "--adapter", "output/adapter", "--image", PICTURE, "--query", "What is it?", "--max-new-tokens", "8"),
    (
        "predict",
        "--adapter",
        "output/adapter",
        "--data",
        "my-data",
        "--output",
        "answers.jsonl",
        "--max-new-tokens",
        "8",
    ),
    ("merge", "--adapter", "output/adapter", "--output", "merged"),
    ("chat", "--model", "merged", "--image", PICTURE, "--query", "What is it?", "--max-new-tokens", "8"),
)
"""The commands, without ``cogtune``."""


def walk(folder: Path) -> list[dict[str, Any]]:
    """Every command in ``folder`` with what it printed; one that fails ends the walk.

    Raises:
        SystemExit: a command ended with another code than 0.
    """
    shutil.copytree(BASE, folder / "cogvlm2")
    records = {f"{n:04}": dialogue("What is it?", f"It is number {n % 7}.") for n in range(60)}
    write_folder(folder / "my-data", records, size=(64, 64))
    own = {"XDG_CACHE_HOME": str(folder / ".cache"), "XDG_STATE_HOME": str(folder / ".state"), "COGTUNE_LANG": "en"}
    rows = []
    for words in WALK:
        command = [sys.executable, "-W", "ignore", "-m", "cogtune", *words]
        done = subprocess.run(
            command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | own
        )
        text = re.sub(r"[^\n]*\r(?!\n)", "", done.stdout).replace(str(folder.resolve()), "...")
        rows.append({"command": " ".join(["cogtune", *words]), "printed": text.strip().splitlines()})
        print(f"$ {rows[-1]['command']}\n{text}", flush=True)
        if done.returncode:
            raise SystemExit(f"ended with {done.returncode}")
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        rows = walk(Path(name))
    write_result(RESULT, {**circumstances("python -m benchmarks.walk"), "rows": rows})


if __name__ == "__main__":
    main()
