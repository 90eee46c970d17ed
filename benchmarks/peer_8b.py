"""A LoRA step of an 8 B picture model in TRL, beside cogtune's on the same card in the same run.

``python -m benchmarks.peer_8b benchmarks/results/peer-8b-h200.json`` takes two and a half minutes of one card. It needs
``trl`` and ``liger-kernel`` (1.16.0 and 0.8.5 were measured), which need ``datasets`` and ``accelerate``. With
``--unsloth FOLDER`` unsloth trains too, in another minute (``--seconds 220``): it takes an older trl, so it is
installed apart.

TRL's ``SFTTrainer`` trains Qwen3-VL-8B with random weights; ``cogtune bench train`` trains CogVLM2, also with random
weights, on as many positions. Both get batches that lie on the card, so neither side's data loading counts. A row is
written as soon as it is measured, and each part has a process of its own: one that fails or runs too long leaves the
others. ``--part`` runs one part here; ``--tiny`` runs all with small sizes on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import qwen3_vl
from benchmarks.peer_trainers import WARM, Unsloth, measure_trl
from cogtune.bench.report import Results, shown_command
from cogtune.system.machine import versions

QUERY_VALUE = r".*language_model.*\.(q_proj|v_proj)"
LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

PEER: dict[str, dict[str, Any]] = {
    "trl": {"targets": QUERY_VALUE},
    "trl, recomputed": {"targets": QUERY_VALUE, "gradient_checkpointing": True},
    "trl, all linears": {"targets": LINEARS},
    "trl + liger": {"targets": QUERY_VALUE, "use_liger_kernel": True},
    "trl + liger, all linears": {"targets": LINEARS, "use_liger_kernel": True},
    "trl + liger, 4 rows": {"targets": QUERY_VALUE, "use_liger_kernel": True, "rows": 4},
}
"""TRL's rows; a setting not named is its default, but for ``gradient_checkpointing``, which is off unless named.
Liger's come last: it replaces functions of the model's module, for every model after it in the process."""
LAST: dict[str, dict[str, Any]] = {
    "trl, recomputed, 8 rows": {"targets": QUERY_VALUE, "gradient_checkpointing": True, "rows": 8, "steps": 2},
    "trl, compiled": {"targets": QUERY_VALUE, "torch_compile": True},
}
"""TRL's rows that take longest. The first is how it trains when nothing is set but the model's bf16 and the adapter.
The second compiles layer by layer."""
UNSLOTH: dict[str, dict[str, Any]] = {
    "unsloth, all linears": {},
    "unsloth, all linears, recomputed": {"recomputed": "unsloth"},
    "unsloth, all linears, 4 rows": {"rows": 4},
}
"""Unsloth's rows, on all linear layers of the decoder; ``recomputed`` is its default."""
OURS = (
    "live", "cached features=cached",
    "live-linears lora.targets=experts", "cached-linears features=cached lora.targets=experts",
    "live-4 train.batch_size=4", "cached-4 features=cached train.batch_size=4",
)  # fmt: skip
"""``linears``: rank 8 on all linear layers of both experts."""
LIBRARIES = ("trl", "liger-kernel", "unsloth", "accelerate", "datasets")


def run_peer(results: Results, rows: dict[str, dict[str, Any]], *, tiny: bool, steps: int) -> None:
    """Measure another trainer's rows in this process; one that fails keeps its error."""
    device = torch.device("cpu" if tiny else "cuda")
    config, grid = qwen3_vl.configuration(tiny), 8 if tiny else qwen3_vl.GRID
    loaded = Unsloth(config, device) if rows is UNSLOTH else None
    for name, setting in rows.items():
        shown = {key: value for key, value in setting.items() if key not in ("rows", "steps")}
        given, count = {key: value for key, value in setting.items() if key != "steps"}, setting.get("steps", steps)
        row: dict[str, Any] = {"name": name, "trainer": name.split(",")[0], "model": "Qwen3-VL-8B", "settings": shown}
        try:
            if loaded is None:
                row |= measure_trl(config, device, given, steps=count, grid=grid)
            else:
                row |= loaded.measure(given, steps=count, grid=grid)
        except Exception as error:
            traceback.print_exc(limit=-6)
            row |= {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        add(results, row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_ours(results: Results, seconds: float, *, tiny: bool, steps: int) -> None:
    """Measure cogtune's rows by its own command, for ``seconds`` at most; every row that it wrote is kept."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ours.json"
        words = [
            "bench",
            "train",
            "--model",
            "random-tiny" if tiny else "random",
            "--steps",
            str(steps),
            "--warmup",
            str(WARM),
        ]
        words += [word for variant in OURS for word in ("--variant", variant)]
        results.record["cogtune_command"] = shown_command(["cogtune", *words])
        _bounded([sys.executable, "-m", "cogtune", *words, "--json", str(file)], seconds)
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    for row in rows:
        settings = {**row.pop("changes"), "features": row.pop("features")}
        own = {"name": f"cogtune, {row['name']}", "trainer": "cogtune", "model": "CogVLM2", "settings": settings}
        add(results, row | own)


def _bounded(words: list[str], seconds: float, **variables: str) -> None:
    """Run a command for ``seconds`` at most."""
    try:
        subprocess.run(words, timeout=max(seconds, 1), check=False, env=os.environ | variables)
    except subprocess.TimeoutExpired:
        print(f"# stopped after {seconds:.0f} s: {' '.join(words[1:4])}", flush=True)


def add(results: Results, row: dict[str, Any]) -> None:
    """Add a row, write the file, and print the row."""
    results.add(row)
    text = row.get("error") or f"{row['median_ms']:.1f} ms, {row['tokens_per_second']:.0f} positions/s"
    print(f"{row['name']}: {text}, LoRA-MFU {row.get('lora_mfu')}, {row.get('reserved_gib')} GiB reserved", flush=True)


def _opened(file: Path, *, fresh: bool) -> Results:
    """The result file: new, or as an earlier part left it."""
    results = Results("peer", "python -m benchmarks.peer_8b", file)
    results.record["versions"] |= versions(LIBRARIES)
    if not fresh and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        results.record |= {key: before[key] for key in ("rows", "cogtune_command") if key in before}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--part", choices=("peer", "ours", "unsloth", "last"))
    parser.add_argument("--unsloth", metavar="FOLDER", help="where unsloth and the trl that it needs are installed")
    parser.add_argument("--seconds", type=float, default=150, help="for everything; with --part ours, for that part")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.part is None:
        run_parts(given)
    elif given.part == "ours":
        run_ours(_opened(given.file, fresh=False), given.seconds, tiny=given.tiny, steps=given.steps)
    else:
        rows = {"peer": PEER, "unsloth": UNSLOTH, "last": LAST}[given.part]
        run_peer(_opened(given.file, fresh=False), rows, tiny=given.tiny, steps=given.steps)


def run_parts(given: argparse.Namespace) -> None:
    """Run every part in a process of its own, until the time is over."""
    _opened(given.file, fresh=True).write()
    began = time.perf_counter()
    for part in ("peer", "ours", "unsloth", "last"):
        left = given.seconds - (time.perf_counter() - began)
        words = [sys.executable, "-m", "benchmarks.peer_8b", str(given.file), "--part", part]
        words += ["--steps", str(given.steps), "--seconds", str(left), *(["--tiny"] if given.tiny else [])]
        if part == "ours":
            _bounded(words, left + 10)  # its own limit comes first, and keeps the rows
        elif part == "unsloth" and given.unsloth is not None:
            first = "import unsloth; from benchmarks.peer_8b import main; main()"  # before anything that it patches
            words[1:3] = ["-c", first]
            packages = os.pathsep.join([given.unsloth, os.environ.get("PYTHONPATH", "")])
            code = str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache")  # what it writes, by default here
            _bounded(words, left, PYTHONPATH=packages, UNSLOTH_COMPILE_LOCATION=code)
        elif part != "unsloth":
            _bounded(words, left if part == "last" else 0.6 * left, ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION="true")


if __name__ == "__main__":
    main()
