"""What today's planner says of every row that was measured: ``python -m benchmarks.planned [FILE.json ...]``.

The plan that a results file holds is its commit's; this is that of this checkout, for the same settings: rows of
`cogtune bench` by their variants, training runs by the command that started them, the rows of `cards-h100.json` by
their fields. ``--segments``: the files were measured with torch's default allocator.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune.bench.flops import Work
from cogtune.bench.models import model_config
from cogtune.bench.prediction import setting_for
from cogtune.bench.report import table
from cogtune.bench.variants import parse_variants
from cogtune.cli.options import split_arguments
from cogtune.configuration.load import load_config
from cogtune.configuration.quantization import QuantSection
from cogtune.data.rows import RowShape
from cogtune.plan.cards import Card, named_like
from cogtune.plan.data_rows import summary
from cogtune.plan.from_config import setting_of
from cogtune.plan.memory import predict
from cogtune.plan.setting import LoraShape, MicroBatch, Setting, adapted_names
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.time import step_time
from cogtune.system.byte_sizes import GIB, MIB

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = (
    "two-cards-h200", "eight-cards", "speed-h200", "cards-h100", "cards-zero3-h100", "launches-h100", "speed-h100",
    "speed-again-h100", "fit-h100", "sweep-batch-h100", "sweep-text-h100", "sweep-rank-h100", "sweep-questions-h100",
    "stream-nf4-h200", "fit-streamed-h200", "stream-bf16-h200",
)  # fmt: skip
_WHOLE_PROJECTION = ("eight-cards", "speed-h200")
"""Of code whose compiled layers also kept q, k and v as they came from the projection."""
_SWITCHES = ("breakdown", "tiny")
_VALUES = ("preset", "features", "variant", "steps", "warmup", "rounds", "cap", "json", "rows")
"""Flags of ``cogtune bench`` that are no configuration keys."""
_WHOLE_LAYERS = ("single", "ddp")  # what train.compile auto compiled when eight-cards.json was measured
_OLD_BUCKET = 500_000_000  # zero2's buffer for gradients when cards-h100.json was measured: DeepSpeed's own size


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measured row, its setting, its file and its card; sizes in GiB, None where they were not measured."""

    name: str
    setting: Setting
    allocated: float | None
    reserved: float | None
    driver: float | None = None
    ms: float | None = None
    file: str
    card: Card

    @property
    def kept_then(self) -> float:
        """GiB that the code of that day kept and today's does not: q and k unrotated beside v, in every layer but the
        last, whose attention is its own."""
        setting, sizes = self.setting, self.setting.sizes
        if self.file not in _WHOLE_PROJECTION or not setting.compiled:
            return 0.0
        width = sizes.hidden_size + sizes.num_multi_query_heads * sizes.head_dim
        return (sizes.num_hidden_layers - 1) * setting.batch.tokens(sizes) * width * setting.width / GIB

    @property
    def plan(self) -> dict[str, float]:
        """What the planner says of each of them, for the code that was measured."""
        memory = predict(self.setting)
        train = memory.phase("train")
        return {
            "allocated": train.allocated / GIB + self.kept_then,
            "reserved": train.reserved / GIB + self.kept_then,
            "driver": (train.reserved + memory.outside) / GIB + self.kept_then,
            "ms": 1000 * step_time(self.setting, self.card).seconds,
        }

    def off(self) -> dict[str, float]:
        """By how much of the measurement the plan is too high."""
        found = {name: getattr(self, name) for name in ("allocated", "reserved", "driver", "ms")}
        said = self.plan
        return {name: said[name] / value - 1 for name, value in found.items() if value is not None}


def measured(name: str | Path, *, expandable: bool = True) -> Iterator[Measured]:
    """The rows of a results file (its path, or its name under `RESULTS`) that the planner knows of."""
    file = name if isinstance(name, Path) else RESULTS / f"{name}.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    if file.stem.startswith("cards-"):
        yield from _cards(file.stem, record)
    elif record.get("kind") == "cards":
        yield from _runs(file.stem, record)
    else:
        yield from _bench(file.stem, record, expandable)


def _bench(name: str, record: Mapping[str, Any], expandable: bool) -> Iterator[Measured]:
    """The rows of ``bench train``, ``fit`` or ``sweep`` that trained, without the baseline."""
    for row in record["rows"]:
        if "error" in row or "tokens" not in row or row["name"].startswith("baseline"):
            continue
        words = shlex.split(row.get("command", row.get("run", record)["command"]))
        words = words[words.index("bench") + 2 :]
        if words and not words[0].startswith("-"):
            words.pop(0)  # a sweep's name
        overrides = split_arguments(words, switches=_SWITCHES, values=_VALUES).overrides
        overrides.pop("model", None)
        overrides["model.path"] = ["random"]  # the published sizes
        changes = " ".join(f"{key}={value}" for key, value in row["changes"].items())
        cached = row["features"] == "cached"
        (variant,) = parse_variants([f"{row['name']} {changes}"], overrides, preset=row["preset"], cached=cached)
        images = 0 if row["preset"] == "text-only" else row["batch_size"]
        work = Work(tokens=row["tokens"], pairs=0, labels=row["labels"], images=images, rows=row["batch_size"])
        setting = setting_for(variant, model_config("random"), work, card=record["card"], ranks=row["ranks"])
        yield Measured(
            name=row["name"],
            setting=replace(setting, expandable=expandable),
            allocated=row["allocated_gib"],
            reserved=row["reserved_gib"],
            driver=row.get("driver_gib"),
            ms=row.get("median_ms"),
            file=name,
            card=named_like(record["card"]),
        )


def _runs(name: str, record: Mapping[str, Any]) -> Iterator[Measured]:
    """Training runs, each with the command that started it."""
    card = named_like(record["card"])
    plain = next(row["command"] for row in record["rows"] if row["name"] == "single")
    for row in record["rows"]:
        if "median_ms" not in row or " bench " in row["command"]:  # a capped card's allocator is not a card's
            continue
        words = shlex.split(row["command"])
        if row["name"] == "published":  # the published script's flags mean these keys
            words = [*shlex.split(plain), "--parallel.deepspeed", str(ROOT / "ds_config.yaml")]
        config = load_config(None, split_arguments(words[words.index("train") + 1 :]).overrides)
        found = re.search(r"WORK/(\d+)\+(\d+)", row["command"])
        assert found is not None, row["command"]
        prompt, answer = int(found[1]), int(found[2])
        tokens = ModelSizes().image_tokens
        rows = summary([RowShape(True, tokens + 1 + prompt + answer, answer, 1)], 1, tokens)
        setting = replace(setting_of(config, rows, ranks=row["ranks"], card=card), expandable=True)
        setting = replace(setting, compile=setting.tensor == 1 and setting.engine in _WHOLE_LAYERS)
        yield Measured(
            name=row["name"],
            setting=setting,
            allocated=row["allocated_gib"],
            reserved=None,
            driver=max(row["card_mib"]) * MIB / GIB,
            ms=row["median_ms"],
            file=name,
            card=card,
        )


def _cards(name: str, record: Mapping[str, Any]) -> Iterator[Measured]:
    """Rows that name their settings by field: S400, cached, rank 8 on the vision experts' q, k and v, uncompiled."""
    adapter = LoraShape(adapted_names(ModelSizes(), ["vision_expert_query_key_value"]), 8)
    for row in record["rows"]:
        tensor, engine = row["ranks"] if row["row"].startswith("tensor") else 1, row["engine"].partition(":")[0]
        setting = Setting(
            batch=MicroBatch(rows=row["batch"]),
            adapter=adapter,
            quant=QuantSection(experts=row["quantisation"]),
            tower="cached",
            engine="ddp" if tensor > 1 else engine,
            ranks=row["ranks"],
            tensor=tensor,
            bucket=_OLD_BUCKET if engine == "zero2" else 0,
            keep_gathered=int(row["keep_gathered"]),
        )
        setting = setting.with_recomputed(32) if row["recompute"] == "all" else setting
        most = {key: max(rank.get(key, 0.0) for rank in row["by_rank"]) for key in ("peak_gib", "reserved_gib")}
        yield Measured(
            name=row["row"],
            setting=setting,
            allocated=most["peak_gib"],
            reserved=most["reserved_gib"] or None,
            ms=1000 * row["median_s"],
            file=name,
            card=named_like(record["cards"][0]),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="all measured ones without it")
    parser.add_argument("--segments", action="store_true", help="measured with torch's default allocator")
    given = parser.parse_args(arguments)
    cells = []
    for name in given.files or FILES:
        for row in measured(name, expandable=not given.segments):
            plan, off = row.plan, row.off()
            pairs = [f"{plan[key]:,.{2 * (key != 'ms')}f} of {getattr(row, key):,.{2 * (key != 'ms')}f} "
                     f"({100 * off[key]:+.1f} %)" if key in off else "-" for key in plan]  # fmt: skip
            cells.append([row.file, row.name, *pairs])
    print(table(["file", "row", "allocated GiB", "reserved GiB", "driver GiB", "ms"], cells))


if __name__ == "__main__":
    main()
