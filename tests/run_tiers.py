"""Runs the test tiers one after the other and prints what each took: ``make test`` and its relatives.

Each tier is one pytest run over one folder, spread over the cores, so its closing lines and its time stand for
themselves. With ``--json FILE`` the table is also written as a result file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIERS = {
    "unit": ["tests/unit"],
    "parity": ["tests/parity"],
    "integration": ["tests/integration"],
    "distributed": ["tests/distributed"],
    "docs": ["tests/docs"],
    "fuzz": ["tests/fuzz"],
    "gpu": ["tests/gpu"],
    "gpu-alone": ["tests/gpu"],  # what looks at the whole process or card: waits, addresses, locked memory
    "web": ["tests/web"],
    # What depends on the versions of transformers and peft: the model, its files, its adapters.
    "oldest": ["tests/unit/model", "tests/unit/checkpoint", "tests/unit/adapters", "tests/parity"],
}
SELECTED = {"gpu": "gpu and not alone", "gpu-alone": "gpu and alone"}
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "pillow", "pytest")
MAX_WORKERS = 8
MAX_ON_A_CARD = 5  # each holds a context and up to a few GiB


def workers(tier: str) -> int:
    """Processes for a tier; distributed tests start two ranks each, GPU tests share one card and wait for compilers."""
    cores = os.cpu_count() or 1
    if tier in ("gpu-alone", "web"):
        return 0
    if tier == "gpu":
        return min(cores // 3, MAX_ON_A_CARD)
    share = cores // 2 if tier == "distributed" else cores
    return min(share, MAX_WORKERS) if share > 1 else 0


def run_tier(tier: str, extra: list[str]) -> dict[str, float | int | str]:
    """Run one tier; its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *TIERS[tier],
            "-q",
            "--durations=5",
            "--durations-min=5",
            f"--junitxml={report}",
            *extra,
        ]
        command += ["-m", SELECTED.get(tier, "not gpu and not campaign")]
        if workers(tier):
            command += ["-n", str(workers(tier)), "--dist", "load" if tier == "gpu" else "loadfile"]
        print(f"\n== {tier}: pytest {' '.join(TIERS[tier])}", flush=True)
        start = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        seconds = time.monotonic() - start
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        if report.exists():
            for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                for key in counts:
                    counts[key] += int(suite.get(key, 0))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {
        "tier": tier,
        "passed": passed,
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(seconds, 1),
        "exit": code,
    }


def git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def record(rows: list[dict[str, float | int | str]]) -> dict[str, object]:
    """The result file: what ran, where, with which versions."""
    return {
        "what": "tests by tier",
        "command": "python tests/run_tiers.py " + " ".join(str(row["tier"]) for row in rows),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: installed(name) for name in LIBRARIES},
        "tiers": rows,
        "table": {
            "columns": ["tier", "passed", "skipped", "failed", "seconds"],
            "columns_zh": ["层", "通过", "跳过", "失败", "秒"],
            "rows": [[row[key] for key in ("tier", "passed", "skipped", "failed", "seconds")] for row in rows],
        },
        "seconds": round(sum(float(row["seconds"]) for row in rows), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiers", nargs="+", choices=list(TIERS))
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments, extra = parser.parse_known_args()
    tiers = [part for tier in arguments.tiers for part in (("gpu", "gpu-alone") if tier == "gpu" else (tier,))]
    rows = [run_tier(tier, extra) for tier in tiers]
    print(f"\n{'tier':<14}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for row in rows:
        print(f"{row['tier']:<14}{row['passed']:>8}{row['failed']:>8}{row['skipped']:>9}{row['seconds']:>9}")
    print(
        f"{'all':<14}"
        + "".join(
            f"{sum(row[key] for row in rows):>{width}}" for key, width in (("passed", 8), ("failed", 8), ("skipped", 9))
        )
        + f"{sum(float(row['seconds']) for row in rows):>9.1f}"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record(rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if any(row["exit"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
