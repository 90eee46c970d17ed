"""Result files from what a run printed, where its own JSON files were lost: ``python -m benchmarks.from_console``.

Only the files the machine had not yet handed over when its time was up are made this way. Each says so, and names the
committed output it is read from; what was not printed is left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LOG = RESULTS / "console" / "h100-2026-11-25.log"
NOTE = "read from the run's printed table, results/console/h100-2026-11-25.log: its JSON file was lost with the machine"
COMMON = {"date": "2026-11-25T09:57:00+00:00", "commit": "73a115e2250bb0af9a58decdcd32aa87cb8e352d",
          "card": "NVIDIA H100 80GB HBM3", "cards": 1, "machine": "x86_64, 32 cores", "note": NOTE,
          "versions": json.loads((RESULTS / "load-h100.json").read_text(encoding="utf-8"))["versions"]}  # fmt: skip
"""Versions are those of the same machine's file that came back."""
TRAIN = "cogtune bench train --steps {steps} --warmup {warmup} {words}"
SPEED = {
    "baseline": {},
    "cached": {"features": "cached"},
    "live": {},
    "rank16": {"features": "cached", "lora.targets": "experts", "lora.rank": "16"},
}
_NF4 = {"features": "cached", "quant.experts": "nf4", "train.gradient_checkpointing": "all"}
NF4 = {"nf4-eager": {**_NF4, "train.compile": "false"}, "nf4-recompute": _NF4}
TREES = {
    "vqa1": {"features": "cached", "preset": "vqa1"},
    "vqa10": {"features": "cached", "preset": "vqa10"},
    "cached-4": {"features": "cached", "train.batch_size": "4", "train.gradient_checkpointing": "all"},
}
ANSWERS = {"vqa10": 10}


def train_rows(text: str, variants: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """The rows of these variants from the printed table."""
    rows = []
    for name, changes in variants.items():
        found = re.search(rf"^{name} +((?:[\d.]+x? +)+)\d+\+\d+$", text, re.M)
        if found is None:
            raise ValueError(f"{LOG}: no row {name}")
        ms, low, high, samples, tokens, mfu, _, allocated, reserved, driver, _, first = (
            float(cell.rstrip("x")) for cell in found[1].split()
        )
        rows.append({
            "name": name, "changes": changes, "batch_size": int(changes.get("train.batch_size", 1)),
            "median_ms": ms, "min_ms": low, "max_ms": high, "samples_per_second": samples,
            "answers_per_second": round(samples * ANSWERS.get(name, 1), 2), "tokens_per_second": tokens,
            "lora_mfu": round(mfu / 100, 3), "allocated_gib": allocated, "reserved_gib": reserved,
            "driver_gib": driver, "first_step_s": first,
        })  # fmt: skip
    return rows


def command(variants: dict[str, dict[str, str]], steps: int, warmup: int) -> str:
    """The command as it was typed."""
    words = " ".join(
        f'--variant "{" ".join([name, *[f"{key}={value}" for key, value in changes.items()]])}"'
        for name, changes in variants.items()
    )
    return TRAIN.format(steps=steps, warmup=warmup, words=words)


def main() -> None:
    """Write the files."""
    text = LOG.read_text(encoding="utf-8")
    failed = {"fp8-cached": {"features": "cached", "quant.experts": "fp8", "quant.tower": "fp8"},
              "fp8-live": {"quant.experts": "fp8", "quant.tower": "fp8"}}  # fmt: skip
    error = "torch.compile of torch 2.11 refused the layer (by_expert in model/attention.py)"
    speed = [
        *train_rows(text, SPEED),
        *({"name": name, "changes": changes, "batch_size": 1, "error": error} for name, changes in failed.items()),
    ]
    files = {
        "speed-second-h100": {"kind": "train", "command": command(SPEED | failed, 10, 3), **COMMON, "rows": speed},
        "speed-nf4-second-h100": {
            "kind": "train", "command": command(NF4, 8, 2), **COMMON, "rows": train_rows(text, NF4),
        },
        "speed-trees-h100": {
            "kind": "train", "command": command(TREES, 8, 2) + " --train.compile false", **COMMON,
            "rows": train_rows(text, TREES),
        },
    }  # fmt: skip
    for name, record in files.items():
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
