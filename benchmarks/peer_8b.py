"""A LoRA step of an 8 B picture model in TRL and in unsloth, beside cogtune's on the same card.

``python -m benchmarks.peer_8b benchmarks/results/peer-8b-h200.json`` takes three minutes of one card. It needs ``trl``
and ``liger-kernel`` (1.16.0 and 0.8.5 were measured), which need ``datasets`` and ``accelerate``. Unsloth takes an
older trl, so it is installed apart; a second command adds its rows, and imports it before what it patches:

    python -c "import unsloth; from benchmarks.peer_8b import main; main()" FILE --add --parts unsloth

Both train Qwen3-VL-8B with random weights; cogtune trains CogVLM2, also with random weights, on as many positions. All
get batches that lie on the card, so loading data counts for none. A row is written as soon as it is measured, and one
that fails leaves the others. ``--tiny`` runs all with small sizes on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import qwen3_vl
from benchmarks.peer_trainers import WARM, Unsloth, measure_trl
from cogtune.bench.report import Results
from cogtune.bench.train import measure
from cogtune.bench.variants import parse_variants
from cogtune.system.machine import versions

QUERY_VALUE = r".*language_model.*\.(q_proj|v_proj)"
LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
Rows = dict[str, dict[str, Any]]

TRL: dict[str, Rows] = {
    "trl": {
        "trl": {"targets": QUERY_VALUE},
        "trl, all linears": {"targets": LINEARS},
        "trl, recomputed": {"targets": QUERY_VALUE, "gradient_checkpointing": True},
    },
    "liger": {
        "trl + liger": {"targets": QUERY_VALUE, "use_liger_kernel": True},
        "trl + liger, all linears": {"targets": LINEARS, "use_liger_kernel": True},
        "trl + liger, 4 rows": {"targets": QUERY_VALUE, "use_liger_kernel": True, "rows": 4},
    },
    "slow": {
        "trl, recomputed, 8 rows": {"targets": QUERY_VALUE, "gradient_checkpointing": True, "rows": 8, "steps": 2},
        "trl, compiled": {"targets": QUERY_VALUE, "torch_compile": True},
    },
}
"""TRL's rows by part; a setting not named is its default, but for ``gradient_checkpointing``, which is off unless
named. ``trl, recomputed, 8 rows`` is how it trains when nothing is set but the model's bf16 and the adapter. Liger
replaces functions of the model's module, so other rows of TRL's come before it or in another process."""
UNSLOTH: Rows = {
    "unsloth, all linears": {},
    "unsloth, all linears, 4 rows": {"rows": 4},
    "unsloth, all linears, recomputed": {"recomputed": "unsloth"},
}
"""Unsloth's rows, on all linear layers of the decoder; ``recomputed`` is its default."""
OURS: dict[str, list[str]] = {
    "ours": ["live", "cached features=cached"],
    "ours-linears": ["live-linears lora.targets=experts", "cached-linears features=cached lora.targets=experts"],
    "ours-4": ["live-4 train.batch_size=4", "cached-4 features=cached train.batch_size=4"],
}
"""cogtune's rows by part; ``linears``: rank 8 on all linear layers of both experts."""
PARTS = ("trl", "liger", *OURS)
LIBRARIES = ("trl", "liger-kernel", "unsloth", "accelerate", "datasets")


def run_peers(results: Results, rows: Rows, *, tiny: bool, steps: int) -> None:
    """Measure another trainer's rows; one that fails keeps its error."""
    device = torch.device("cpu" if tiny else "cuda")
    config, grid = qwen3_vl.configuration(tiny), 8 if tiny else qwen3_vl.GRID
    loaded: Unsloth | None = None
    for name, setting in rows.items():
        given = {key: value for key, value in setting.items() if key != "steps"}
        shown = {key: value for key, value in given.items() if key != "rows"}
        row: dict[str, Any] = {"name": name, "trainer": name.split(",")[0], "model": "Qwen3-VL-8B", "settings": shown}
        count = setting.get("steps", steps)
        try:
            if rows is UNSLOTH:
                mode = given.get("recomputed", False)
                if loaded is None or loaded.recomputed != mode:
                    loaded = None  # frees the model before the next one
                    loaded = Unsloth(config, device, mode)
                row |= loaded.measure(given.get("rows", 1), steps=count, grid=grid)
            else:
                row |= measure_trl(config, device, given, steps=count, grid=grid)
        except Exception as error:
            traceback.print_exc(limit=-6)
            row |= {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        add(results, row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Ours(Results):
    """Rows of cogtune's own bench, each added to the comparison as well."""

    def __init__(self, comparison: Results) -> None:
        super().__init__("train", "", None)
        self._comparison = comparison

    def add(self, row: dict[str, Any]) -> None:
        super().add(row)
        settings = {**row["changes"], "features": row["features"]}
        own = {"name": f"cogtune, {row['name']}", "trainer": "cogtune", "model": "CogVLM2", "settings": settings}
        add(self._comparison, row | own)


def run_ours(results: Results, texts: list[str], *, tiny: bool, steps: int) -> None:
    """Measure cogtune's rows as ``cogtune bench train --variant TEXT ...`` does."""
    model = {"model.path": ["random-tiny" if tiny else "random"]}
    variants = parse_variants(texts, model, preset="s400", cached=False)
    measure(variants, _Ours(results), warm=WARM, steps=steps, rounds=1, breakdown=False)


def add(results: Results, row: dict[str, Any]) -> None:
    """Add a row, write the file, and print the row."""
    results.add(row)
    text = row.get("error") or f"{row['median_ms']:.1f} ms, {row['tokens_per_second']:.0f} positions/s"
    print(f"{row['name']}: {text}, LoRA-MFU {row.get('lora_mfu')}, {row.get('reserved_gib')} GiB reserved", flush=True)


def opened(file: Path | None, *, adding: bool) -> Results:
    """The result file, new or as an earlier command left it."""
    before = (
        json.loads(file.read_text(encoding="utf-8"))
        if adding and file and file.is_file()
        else {"rows": [], "versions": {}}
    )
    results = Results("peer", "python -m benchmarks.peer_8b", file)
    results.record["versions"] |= versions(LIBRARIES) | before["versions"]  # trl's is the one of its own rows
    results.record["rows"] = before["rows"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--parts", nargs="+", choices=(*TRL, "unsloth", *OURS), default=PARTS)
    parser.add_argument("--add", action="store_true", help="keep the file's other rows")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no part after so many")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    began, results = time.perf_counter(), opened(given.file, adding=given.add)
    for part in given.parts:
        spent = time.perf_counter() - began
        if spent > given.seconds:
            print(f"# left out after {spent:.0f} s: {part}", flush=True)
        elif part in OURS:
            run_ours(results, OURS[part], tiny=given.tiny, steps=given.steps)
        else:
            run_peers(results, UNSLOTH if part == "unsloth" else TRL[part], tiny=given.tiny, steps=given.steps)


if __name__ == "__main__":
    main()
