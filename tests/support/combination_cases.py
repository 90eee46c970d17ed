"""Runs that cover every pair of settings that go together. One launch makes those of several ranks:

torchrun --standalone --nproc-per-node 2 -m tests.support.combination_cases BASE DATA OUTPUT
"""

from __future__ import annotations

import sys
import traceback
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cogtune.cli.main import guarded
from cogtune.configuration.engine_rules import ENGINE, ENGINES, RULES, Pair, refusal
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.run_config import RunConfig
from cogtune.train.run import train
from tests.support.training import make_config

Combination = dict[str, str]
"""A value per key of `COVERED`."""

COVERED = {
    ENGINE: ENGINES,
    "parallel.offload": ("none", "weights", "optimizer"),
    "lora.dora": ("false", "true"),
    "data.turns": ("all", "one_random"),
    "lora.targets": ("experts", "vision-tower"),
    "data.cache_features": ("off", "on"),
    "quant.experts": ("none", "nf4", "int8", "fp8"),
    "quant.stream": ("off", "auto"),
}
"""The keys whose values are run two by two, wherever no rule refuses them."""


def allowed() -> list[Combination]:
    """Every combination of a value per key that no rule refuses."""
    everything = [dict(zip(COVERED, values, strict=True)) for values in product(*COVERED.values())]
    return [found for found in everything if refusal({key: (value,) for key, value in found.items()}) is None]


def pairs_in(combination: Combination) -> set[Pair]:
    """Its values two by two, in the order of the keys."""
    return set(combinations(combination.items(), 2))


def allowed_pairs() -> set[Pair]:
    """Every pair of values that can stand together in a run."""
    return set().union(*(pairs_in(found) for found in allowed()))


def refused_pairs() -> list[Pair]:
    """Every pair of values that a rule refuses, but for formats that a quantised part does not have."""
    fields = {f"quant.{part}": field.annotation for part, field in QuantSection.model_fields.items()}
    formats = {key: get_args(kind) for key, kind in fields.items() if get_origin(kind) is Literal}
    pairs = (pair for rule in RULES for pair in rule.pairs())
    return [(first, (key, value)) for first, (key, value) in pairs if value in formats.get(key, (value,))]


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
    """The same on one device, with every layer there."""
    return {**combination, ENGINE: "single", "parallel.offload": "none", "quant.stream": "off"}


def offloads(combination: Combination) -> bool:
    """Do saved inputs wait in host memory? That changes no loss, so half of the runs have it and compare with one that
    has not."""
    return combination[ENGINE] != "single" and combination["data.turns"] == "all"


def make_run(base: Path, data: Path, output: Path, combination: Combination) -> RunConfig:
    """Two steps of two rows, on however many ranks hold the model."""
    engine = combination[ENGINE]
    values: dict[str, Any] = {
        "train__optimizer": "sgd",
        "train__lr": 0.1,
        "train__max_steps": 2,
        "train__batch_size": 2 if engine in ("single", "tensor") else 1,
        "parallel__offload": combination["parallel.offload"],
        "lora__dora": combination["lora.dora"] == "true",
        "lora__targets": ["experts", *({"vision-tower"} & {combination["lora.targets"]})],
        "data__turns": combination["data.turns"],
        "data__cache_features": combination["data.cache_features"],
        "quant__experts": combination["quant.experts"],
        # a CPU has room for all layers, so auto streams none: keep none there, as a full card would
        "quant__stream": {"off": "off", "auto": "0"}[combination["quant.stream"]],
        "data__cache_dir": str(output / "cache"),
    }
    if offloads(combination):
        values |= {"train__gradient_checkpointing": "all", "train__activation_offloading": True}
    if engine == "tensor":
        values["parallel__tensor"] = 2
    elif engine != "single":
        values["parallel__engine"] = engine
    if engine == "zero3":
        values["parallel__deepspeed"] = str(data / "zero3.yaml")
    return make_config(base, [data / "pictures", data / "pictures.jsonl"], output / name_of(combination), **values)


def main(base: Path, data: Path, output: Path) -> None:
    """ZeRO-3 comes last: it replaces ``torch.nn.functional.linear`` for the rest of the process."""
    several = [found for found in covering() if found[ENGINE] != "single"]
    for combination in sorted(several, key=lambda found: found[ENGINE]):
        try:
            train(make_run(base, data, output, combination))
        except Exception:  # the others still run; the test of this one finds no losses and shows this
            (output / f"{name_of(combination)}.failed").write_text(traceback.format_exc())


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*(Path(word) for word in sys.argv[1:4]))))
