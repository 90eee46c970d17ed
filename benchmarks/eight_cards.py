"""The published table beside ours, on any number of cards of one host:
``python -m benchmarks.eight_cards OUT.json [--cards N] [--model BASE] [--only ROW ...]``.

Every row is a launch of its own and is written as it ends; called again, it runs only what OUT lacks or what failed, so
the rows may be spread over several calls on one machine. Records are S400, the tower's output given, one row a card,
rank 8 on ``vision_expert_query_key_value``, no dropout, one rate, seed and order; a row's name says where it differs.
The first row is one card alone, for the scaling of the others. ``published`` is the published script's own command line
under the deepspeed launcher on records of the same lengths, and needs a checkpoint folder; the other rows make random
weights where they train.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cogtune.bench.report import circumstances, shown_command

STEPS, WARM, PUBLISHED_STEPS = 17, 3, 40
ROW_SECONDS = 420
_COMMON = ("--preset", "s400", "--steps", str(STEPS), "--warmup", str(WARM), "--train.schedule", "constant")
_CACHED = ("--features", "cached")
ROWS: dict[str, tuple[str, ...]] = {
    "single": _CACHED,
    "published": (),
    "zero2": (*_CACHED, "--parallel.engine", "zero2"),
    "ddp": (*_CACHED, "--parallel.engine", "ddp"),
    "fsdp2": (*_CACHED, "--parallel.engine", "fsdp2"),
    "zero3": (*_CACHED, "--parallel.engine", "zero3"),
    "fsdp2-nf4": (*_CACHED, "--parallel.engine", "fsdp2", "--quant.experts", "nf4"),
    "tensor2": (*_CACHED, "--parallel.tensor", "2"),
    "512+512": (*_CACHED, "--parallel.engine", "ddp", "--preset", "512+512"),
    "live": ("--features", "live", "--parallel.engine", "ddp"),
}
"""Words behind ``cogtune bench train``, later ones winning; ``published`` has a command of its own."""
ALIKE = ("zero2", "ddp", "fsdp2", "zero3")
LOSSES_AGREE = 0.02
"""Twenty steps of bfloat16: each engine sums gradients in another order, AdamW's first steps have the size of their
sign, and a weight that crosses a rounding boundary of bfloat16 moves activations by 2^-8. Of a loss near 12."""


def run_row(name: str, cards: int, model: str, small: bool) -> dict[str, Any]:
    """Launch a row; its numbers, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        published = name == "published"
        words = _published(Path(folder), cards, model) if published else _own(name, cards, model, small, output)
        shown = shown_command([word.replace(folder, "DIR") for word in words])
        started = time.perf_counter()
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=ROW_SECONDS)
            told = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            told = f"not done after {ROW_SECONDS} s"
        wall = round(time.perf_counter() - started, 1)
        found = _read_published(Path(folder), cards) if published else _read(output)
    start = told.rfind("error[")
    return {"name": name, "command": shown, "wall_s": wall, **(found or {"error": told[start:][:800] if start >= 0
                                                                        else told[-800:]})}  # fmt: skip


def _own(name: str, cards: int, model: str, small: bool, output: Path) -> list[str]:
    ranks = 1 if name == "single" else cards
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    own = ["-m", "cogtune", "bench", "train", *_COMMON, "--model.path", model, *ROWS[name], "--json", str(output)]
    return [sys.executable, *launcher, *own, *(["--preset", "text=40"] if small else [])]


def _read(file: Path) -> dict[str, Any] | None:
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return {key: value for key, value in rows[0].items() if key != "name"} if rows else None


def _published(folder: Path, cards: int, model: str) -> list[str]:
    """The published script's command on a data folder in its layout, with texts of S400's lengths in the base's tokens
    (a random checkpoint's tokenizer has one token a byte)."""
    from tests.support.data_folders import dialogue, write_folder

    question, answer = "q" * 182, "a" * 199  # 200 tokens with the template, 200 with the end token
    count = PUBLISHED_STEPS * cards
    data = write_folder(folder / "data", {f"{i:04d}": dialogue(question, answer) for i in range(count)})
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(cards)]
    own = ["peft_lora.py", "--ds_config", "ds_config.yaml", "--model_path", model, "--dataset_path", str(data)]
    own += ["--save_path", str(folder / "out"), "--lora_dropout", "0", "--max_input_len", "512", "--lr", "1e-4"]
    own += ["--max_output_len", "512", "--batch_size", "1", "--num_epochs", "1", "--train_dataset_rate", "1"]
    return [*launcher, *own, "--save_step", str(PUBLISHED_STEPS)]


def _read_published(folder: Path, cards: int) -> dict[str, Any] | None:
    """From the run's own record, a line for every ten steps; the first ten are warm-up."""
    file = folder / "out" / "metrics.jsonl"
    if not file.is_file():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    rates = sorted(line["samples_per_second"] for line in steps[1:])
    if not rates:
        return None
    rate = rates[len(rates) // 2]
    return {
        "ranks": cards,
        "batch_size": 1,
        "samples_per_second": rate,
        "median_ms": round(1000 * cards / rate, 3),
        "allocated_gib": max(line["memory_gib"] for line in steps),
        "losses": [line["loss"] for line in steps],
    }


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scaling against one card of the same machine, and whether the engines' losses agree."""
    by_name = {row["name"]: row for row in rows if "error" not in row}
    single = by_name.get("single")
    scaling = {
        name: round(row["samples_per_second"] / single["samples_per_second"], 3)
        for name, row in by_name.items()
        if single is not None and name != "single"
    }
    alike = [by_name[name]["losses"] for name in ALIKE if name in by_name]
    worst = max((max(step) - min(step) for step in zip(*alike, strict=False)), default=0.0) if len(alike) > 1 else None
    agree = None if worst is None else worst <= LOSSES_AGREE
    return {"scaling": scaling, "losses": {"compared": [name for name in ALIKE if name in by_name],
            "largest_difference": worst, "allowed": LOSSES_AGREE, "agree": agree}}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cards", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--model", default="random")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--small", action="store_true", help="the tiny model, to try the script on a CPU")
    given = parser.parse_args(arguments)
    model = "random-tiny" if given.small else given.model
    command = ["python", "-m", "benchmarks.eight_cards", *(arguments or sys.argv[1:])]
    record: dict[str, Any] = {"kind": "cards", **circumstances(shown_command(command)), "rows": []}
    if given.output.is_file():
        record["rows"] = json.loads(given.output.read_text(encoding="utf-8"))["rows"]
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    for name in given.only or ROWS:
        if any(row["name"] == name and "error" not in row for row in record["rows"]):
            continue
        row = run_row(name, given.cards, model, given.small)
        record["rows"] = [*(other for other in record["rows"] if other["name"] != name), row]
        record |= compare(record["rows"])
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(_line(row), flush=True)
    print(json.dumps(compare(record["rows"])))


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']:12} FAILED after {row['wall_s']:.0f} s: {row['error']}"
    return (
        f"{row['name']:12} {row['samples_per_second']:8.2f} samples/s  {row['median_ms']:8.1f} ms  "
        f"{row.get('peak_reserved_gib', row['allocated_gib']):6.2f} GiB a card  {row['wall_s']:.0f} s in all"
    )


if __name__ == "__main__":
    main()
