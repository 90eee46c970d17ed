"""What the planner predicts for one to sixteen H100: samples per second and memory of each, by engine.

``python -m benchmarks.scaling`` writes ``benchmarks/results/scaling.json``. No measurement: the model of communication
behind it was fitted to two cards (``cogtune.plan.calibration``), and the table says what follows for more.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogtune.bench.report import commit
from cogtune.plan.cards import REFERENCE
from cogtune.plan.memory import predict
from cogtune.plan.setting import Adapter, Setting, adapted_names
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.time import step_time
from cogtune.system.byte_sizes import GIB

OUTPUT = Path(__file__).parent / "results" / "scaling.json"
SPREADS = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "8": (8, 1), "2 x 8": (16, 2)}
"""Cards as they are written -> how many, on how many hosts."""
ENGINES = ("ddp", "zero2", "fsdp2", "zero3")


def settings() -> dict[tuple[str, str], Setting]:
    """Engine and spread -> batch 4 of a picture and 400 text tokens, cached, all layers recomputed, LoRA rank 8."""
    adapter = Adapter(adapted_names(ModelSizes(), ["vision_expert_query_key_value"]), 8)
    base = Setting(adapter=adapter, tower="cached").with_recomputed(32).with_batch(rows=4)
    found = {}
    for engine in ENGINES:
        for name, (cards, hosts) in SPREADS.items():
            chosen = engine if cards > 1 else "single"
            found[engine, name] = replace(base, engine=chosen, ranks=cards, hosts=hosts)
    return found


def main() -> None:
    rows, measures = [], []
    for engine in ENGINES:
        cells: list[Any] = [engine]
        single = 0.0
        for name in SPREADS:
            setting = settings()[engine, name]
            rate = setting.batch.rows * setting.ranks / step_time(setting, REFERENCE).seconds
            single = single or rate
            memory = predict(setting).phase("train").reserved / GIB
            measures.append({"engine": engine, "cards": name, "samples_per_second": rate, "reserved_gib": memory})
            cells.append(f"{rate:.1f} ({rate / single:.2f}x), {memory:.1f} GiB")
        rows.append(cells)
    content = {
        "command": "python -m benchmarks.scaling",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "kind": "prediction",
        "predictions": measures,
        "table": {
            "columns": ["engine", *(f"{name} H100" for name in SPREADS)],
            "columns_zh": ["引擎", *(f"{name} 张 H100" for name in SPREADS)],
            "rows": rows,
        },
    }
    OUTPUT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(" | ".join(row) for row in rows))


if __name__ == "__main__":
    main()
