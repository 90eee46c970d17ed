"""The fuzz campaign: ``python -m tests.fuzz --inputs 100000 --seed 1 --output benchmarks/results/fuzz.json``.

``make fuzz`` runs it. Each kind of input gets its share. ``--target NAME --number N`` tries one input again, and
``--keep FOLDER`` leaves its files there. The exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.fuzz.harness import MEMORY, SECONDS, Found, Input, Result, child, try_inputs
from tests.fuzz.targets import CAMPAIGN, TARGETS

SLICE = 4000
NAMES = [target.name for target in CAMPAIGN]


def inputs_of(count: int, seed: int, names: list[str]) -> Iterator[Input]:
    """Inputs ``count`` in all, in rounds over the targets, each as often as its weight."""
    chosen = [target for target in CAMPAIGN if target.name in names for _ in range(target.weight)]
    numbers: Counter[str] = Counter()
    for place in range(count):
        name = chosen[place * 7919 % len(chosen)].name  # a prime, so that each slice has all targets
        yield Input(name, seed, numbers[name])
        numbers[name] += 1


def campaign(inputs: list[Input], jobs: int, told: Callable[[dict[str, Result]], None]) -> dict[str, Result]:
    """Try ``inputs`` in slices; ``told`` is called with all results after each."""
    results: dict[str, Result] = {}

    def work(part: list[Input]) -> dict[str, Result]:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            return try_inputs(part, Path(folder))

    with ThreadPoolExecutor(jobs) as pool:
        size = min(SLICE, -(-len(inputs) // jobs))
        parts = [pool.submit(work, inputs[first : first + size]) for first in range(0, len(inputs), size)]
        for part in as_completed(parts):
            for name, result in part.result().items():
                results.setdefault(name, Result()).add(result)
            told(results)
    return results


def kinds(results: dict[str, Result]) -> dict[str, list[Found]]:
    """What was found, faults of one kind together."""
    found: dict[str, list[Found]] = {}
    for result in results.values():
        for one in result.found:
            found.setdefault(_kind(one.what), []).append(one)
    return found


def _kind(what: str) -> str:
    """A fault without the input's own texts."""
    where = re.search(r"\[[^\[\]]+:\d+ [^\[\]]+\]$", what)
    return where.group() if where else re.sub(r"'[^']*'|\"[^\"]*\"|\d+|/\S+", "_", what)[:120]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--target", action="append", choices=NAMES)
    parser.add_argument("--number", type=int)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        child({target.name: target for target in TARGETS}, options.child)
        return 0
    if options.number is not None:
        return _one(Input(options.target[0], options.seed, options.number), options.keep)
    began = time.monotonic()

    def told(results: dict[str, Result]) -> None:
        tried, found = sum(one.tried for one in results.values()), sum(len(one.found) for one in results.values())
        print(f"{tried} inputs, {found} found, {time.monotonic() - began:.0f} s", flush=True)
        if options.output is not None:  # a campaign that is stopped keeps what it has
            _write(options.output, results, time.monotonic() - began, arguments, options.jobs, options.seed)

    inputs = list(inputs_of(options.inputs, options.seed, options.target or NAMES))
    results = campaign(inputs, options.jobs, told)
    for kind, several in kinds(results).items():
        print(f"\n{len(several)} x {kind}")
        for one in several[:2]:
            print(f"   {one.target} --seed {one.seed} --number {one.number} {one.kept}: {one.what}")
    return 1 if any(result.found for result in results.values()) else 0


def _write(file: Path, results: dict[str, Result], seconds: float, arguments: list[str], jobs: int, seed: int) -> None:
    from cogtune.bench.report import circumstances, write_result

    rows = [[name, result.tried, len(result.found)] for name, result in sorted(results.items())]
    write_result(file, {
        **circumstances(" ".join(["python", "-m", "tests.fuzz", *arguments])),
        "inputs": sum(result.tried for result in results.values()),
        "seed": seed,
        "jobs": jobs,
        "seconds": round(seconds),
        "limits": {"processor seconds": SECONDS, "memory, bytes": MEMORY},
        "targets": {name: {
            "inputs": result.tried,
            "found": len(result.found),
            "slowest, processor seconds": round(result.slowest, 2),
            "ended": dict(sorted(result.ended.items())),
        } for name, result in sorted(results.items())},
        "found": [{"kind": kind, "inputs": len(several), "first": asdict(several[0])}
                  for kind, several in kinds(results).items()],
        "table": {
            "columns": ["what was mutated", "inputs", "faults found"],
            "columns_zh": ["变异的内容", "输入数", "发现的故障"],
            "rows": rows,
        },
    })  # fmt: skip


def _one(given: Input, keep: Path | None) -> int:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = keep or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        found: list[Any] = try_inputs([given], root)[given.target].found
    print(found[0].what if found else "nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
