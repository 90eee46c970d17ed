"""Runs that cover every pair of settings that go together. One launch makes those of several ranks:

torchrun --standalone --nproc-per-node 2 -m tests.support.combination_cases BASE DATA OUTPUT
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from cogtune.cli.main import guarded
from cogtune.configuration.run_config import RunConfig
from cogtune.train.engines.rules import allowed, allowed_pairs, pairs_in
from cogtune.train.run import train
from tests.support.training import make_config

Combination = dict[str, str]


def covering() -> list[Combination]:
    """A short list of combinations in which every pair of values that goes together stands at least once."""
    pool, missing, chosen = allowed(), allowed_pairs(), list[Combination]()
    while missing:
        chosen.append(max(pool, key=lambda found: len(pairs_in(found) & missing)))
        missing -= pairs_in(chosen[-1])
    return chosen


def name_of(combination: Combination) -> str:
    return "-".join(combination.values())


def reference_of(combination: Combination) -> Combination:
    """The same on one device."""
    return {**combination, "engine": "single", "offload": "none"}


def make_run(base: Path, data: Path, output: Path, combination: Combination) -> RunConfig:
    """Two steps of two rows, on however many ranks hold the model."""
    engine = combination["engine"]
    values: dict[str, Any] = {
        "train__optimizer": "sgd",
        "train__lr": 0.1,
        "train__max_steps": 2,
        "train__batch_size": 2 if engine in ("single", "tensor") else 1,
        "parallel__offload": combination["offload"],
        "lora__dora": combination["adapter"] == "dora",
        "lora__targets": ["experts", "vision-tower"] if combination["tower"] == "trained" else ["experts"],
        "data__turns": combination["rows"],
        "data__cache_features": combination["features"],
        "quant__experts": combination["weights"],
        "data__cache_dir": str(output / "cache"),
    }
    if engine == "tensor":
        values["parallel__tensor"] = 2
    elif engine != "single":
        values["parallel__engine"] = engine
    if engine == "zero3":
        values["parallel__deepspeed"] = str(data / "zero3.yaml")
    return make_config(base, [data / "pictures", data / "pictures.jsonl"], output / name_of(combination), **values)


def main(base: Path, data: Path, output: Path) -> None:
    """ZeRO-3 comes last: it replaces ``torch.nn.functional.linear`` for the rest of the process."""
    several = [found for found in covering() if found["engine"] != "single"]
    for combination in sorted(several, key=lambda found: found["engine"]):
        try:
            train(make_run(base, data, output, combination))
        except Exception:  # the others still run; the test of this one finds no losses and shows this
            (output / f"{name_of(combination)}.failed").write_text(traceback.format_exc())


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*(Path(word) for word in sys.argv[1:4]))))
