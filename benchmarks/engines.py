"""Every engine against one device, on CPU ranks: ``python -m benchmarks.engines [--ranks 2 4] [--engines ddp ...]``.

``tests/distributed/test_engines.py`` makes the runs, bounds the differences and records them. Writes
``benchmarks/results/engines.json``, adding to what it holds; some minutes for each engine and number of ranks.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.from_tests import recorded
from cogtune.bench.report import circumstances, write_result

RESULT = Path(__file__).parent / "results" / "engines.json"
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "tensor")
TESTS = "first_loss_and_gradient or twenty or uneven"
LOSS, ADAPTER, ALLOWED = (
    "loss, largest relative difference", "adapter, difference over movement", "allowed on two ranks",
)  # fmt: skip
_KEY = ("engine", "ranks", "case")


def measure(engine: str, ranks: int) -> list[dict[str, Any]]:
    """The recorded differences of one engine on so many ranks."""
    words = ("tests/distributed/test_engines.py", "-k", f"({TESTS}) and {engine}")
    rows = []
    for found in recorded(*words, COGTUNE_TEST_RANKS=str(ranks)):
        assert re.search(rf"\b{engine}\b", found["test"][0]), found["test"]
        figures = {key: float(found[key][0]) for key in (LOSS, ADAPTER, ALLOWED)}
        rows.append({"engine": engine, "ranks": ranks, "case": found["case"][0], **figures})
    return rows


def write(found: list[dict[str, Any]]) -> None:
    """Add rows to the result file; a row measured again replaces the earlier one."""
    before = json.loads(RESULT.read_text(encoding="utf-8"))["measured"] if RESULT.exists() else []
    new = {tuple(row[key] for key in _KEY) for row in found}
    rows = [row for row in before if tuple(row[key] for key in _KEY) not in new] + found
    rows.sort(key=lambda row: (row["ranks"], ENGINES.index(row["engine"])))
    columns = ["engine", "ranks", "case", "loss differs by", "adapter differs by", "tests allow"]
    table = {
        "columns": columns,
        "columns_zh": ["引擎", "进程数", "情形", "损失相差", "适配器相差", "测试允许"],
        "rows": [[*(row[key] for key in _KEY), f"{row[LOSS]:.1e}", f"{row[ADAPTER]:.1e}", f"{row[ALLOWED]:.0e}"]
                 for row in rows],
    }  # fmt: skip
    write_result(RESULT, {**circumstances("python -m benchmarks.engines"), "measured": rows, "table": table})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    given = parser.parse_args()
    for ranks in given.ranks:
        for engine in given.engines:
            if engine != "tensor" or ranks == 2:  # the tiny model has two key/value heads
                write(measure(engine, ranks))


if __name__ == "__main__":
    main()
