"""What tests only bound, as they measured it, and every message of a bad input: ``python -m benchmarks.proofs``.

Differences from the published modules' fixtures, trees against separate samples, a run killed and repeated. Writes
``benchmarks/results/proofs.json`` and, with each message in both languages, ``benchmarks/results/mistakes.json``; some
minutes on two cores. ``python -m benchmarks.proofs mistakes`` writes the second alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.from_tests import recorded
from cogtune.bench.report import circumstances, write_result

RESULTS = Path(__file__).parent / "results"
TESTS = ("tests/parity", "tests/integration/test_resume_killed.py", "-k", "not between_any_two_writes")
MISTAKES = "tests/integration/test_bad_input.py"


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


def mistakes(words: str) -> int:
    """Record what is said to every bad input; returns how many there are."""
    found = [{"mistake": test["mistake"][0], "found": test["found"][0], "exit code": 2, "en": test["en"][0],
              "zh": test["zh"][0]} for test in recorded(MISTAKES)]  # fmt: skip
    write_result(RESULTS / "mistakes.json", {**circumstances(words), "rows": found})
    return len(found)


def main(arguments: list[str]) -> None:
    words = " ".join(["python -m benchmarks.proofs", *arguments])
    count = mistakes(words)
    if arguments == ["mistakes"]:
        return
    about = circumstances(words)
    rows = [*figures(), [f"{count} bad inputs, exit codes", "2"]]
    table = {"columns": ["what", "measured"], "columns_zh": ["内容", "测得"], "rows": rows}
    write_result(RESULTS / "proofs.json", {**about, "table": table})


if __name__ == "__main__":
    main(sys.argv[1:])
