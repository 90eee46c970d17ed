"""What tests only bound, as they measured it, and every message of a bad input: ``python -m benchmarks.proofs``.

Differences from the published modules' fixtures, trees against separate samples, a run killed and repeated, the start
of the command line. Writes ``benchmarks/results/proofs.json`` and, with each message in both languages,
``benchmarks/results/mistakes.json``; some minutes on two cores.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.from_tests import recorded
from cogtune.bench.report import circumstances, write_result

RESULTS = Path(__file__).parent / "results"
TESTS = ("tests/parity", "tests/integration/test_resume_killed.py", "-k", "not between_any_two_writes")
MISTAKES = "tests/integration/test_bad_input.py"
STARTS = 5


def figures() -> list[list[str]]:
    """What the tests recorded: of each figure the largest."""
    found: dict[str, list[str]] = {}
    for test in recorded(*TESTS):
        for name, values in test.items():
            if name != "test":
                found.setdefault(name, []).extend(values)
    return [[name, _largest(values)] for name, values in found.items()]


def _largest(values: list[str]) -> str:
    try:
        largest = max(map(float, values))
    except ValueError:
        return values[-1]
    return f"{largest:.1e}" if largest else "0"


def start(*words: str) -> list[str]:
    """Median seconds of some starts of a command."""
    times = []
    for _ in range(STARTS):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "cogtune", *words], check=True, capture_output=True)
        times.append(time.monotonic() - began)
    return [f"`cogtune {' '.join(words)}`, seconds", f"{statistics.median(times):.2f}"]


def main() -> None:
    about = circumstances("python -m benchmarks.proofs")
    mistakes = [{"mistake": test["mistake"][0], "exit code": 2, "en": test["en"][0], "zh": test["zh"][0]}
                for test in recorded(MISTAKES)]  # fmt: skip
    write_result(RESULTS / "mistakes.json", {**about, "rows": mistakes})
    rows = [*figures(), start("--help"), start("train", "--help"), [f"{len(mistakes)} bad inputs, exit codes", "2"]]
    table = {"columns": ["what", "measured"], "columns_zh": ["内容", "测得"], "rows": rows}
    write_result(RESULTS / "proofs.json", {**about, "table": table})


if __name__ == "__main__":
    main()
