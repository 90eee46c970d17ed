"""Every engine against one device, on CPU ranks: ``python -m benchmarks.engines [--ranks 2 4] [--engines ddp ...]``.

The cases are those of ``tests/distributed/test_engines.py``, which bounds what is measured here. Writes
``benchmarks/results/engines.json``, adding to what it holds; some minutes for each engine and number of ranks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cogtune.adapters.attach import attach, save_adapter
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import guarded
from cogtune.train.log import read_metrics
from cogtune.train.run import train
from tests.support.engine_cases import make_case
from tests.support.launching import launch
from tests.support.training import make_config, write_data

RESULT = Path(__file__).parent / "results" / "engines.json"
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "tensor")
CASES = {
    "gradient": ("first step's gradient", 1e-6),
    "sgd": ("20 SGD steps", 1e-5),
    "adamw": ("20 AdamW steps", 1e-2),
    "accumulated": ("6 steps of 2 micro-batches", 1e-5),
    "text": ("mixed batches, a rank without pictures", 1e-5),
}
"""Case -> what it is, and the most ||difference|| / ||movement|| of the adapter that the tests allow on two ranks."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in other))


def prepare(folder: Path) -> tuple[Path, Path]:
    """A tiny base, and the data with the adapter that the gradient is taken from."""
    base, data = make_tiny(folder / "base"), folder / "data"
    write_data(data / "pictures", 8, text_only=5)
    write_data(data / "one", 2)
    model = attach(load_model(base, dtype=torch.float32), make_config(data, data, data).lora)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1, generator=generator)
    save_adapter(model, data / "adapter")
    (data / "zero3.yaml").write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    return base, data


def inside(base: Path, data: Path, output: Path, engine: str, ranks: int) -> None:
    """All cases of an engine, in the ranks of one launch."""
    values: dict[str, Any] = {"parallel__engine": engine}
    if engine == "tensor":
        values = {"parallel__tensor": ranks}
    if engine == "zero3":
        values["parallel__deepspeed"] = str(data / "zero3.yaml")
    for name in CASES:
        train(make_case(base, data, output, name, rows=ranks if engine == "tensor" else 1, **values))


def compare(folder: Path, data: Path, output: Path, engine: str, ranks: int) -> list[dict[str, Any]]:
    single, found = folder / f"single-{ranks}", []
    for name, (what, allowed) in CASES.items():
        start = (
            weights(single / "start") if name != "gradient" else load_file(data / "adapter/adapter_model.safetensors")
        )
        ours, theirs = weights(output / name), weights(single / name)
        pairs = zip(losses(output / name), losses(single / name), strict=True)
        found.append(
            {
                "engine": engine,
                "ranks": ranks,
                "case": what,
                "loss, largest relative difference": max(abs(a / b - 1) for a, b in pairs),
                "adapter, difference over movement": distance(ours, theirs) / distance(theirs, start),
                "allowed on two ranks": allowed,
            }
        )
    return found


def measure(folder: Path, engines: list[str], ranks: int, base: Path, data: Path) -> list[dict[str, Any]]:
    for name in ("start", *CASES):
        train(make_case(base, data, folder / f"single-{ranks}", name, rows=ranks))
    found = []
    for engine in engines:
        output = folder / f"{engine}-{ranks}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "benchmarks.engines", "--inside", str(base), str(data), str(output), engine, str(ranks)]
        done = launch(command, timeout=1500)
        if done.code:
            print(f"{engine} on {ranks} ranks FAILED\n{done.output[-3000:]}", flush=True)
            continue
        rows = compare(folder, data, output, engine, ranks)
        for row in rows:
            print(json.dumps(row), flush=True)
        found += rows
    return found


def write(found: list[dict[str, Any]]) -> None:
    """Add rows to the result file; a row measured again replaces the earlier one."""
    before = json.loads(RESULT.read_text())["measured"] if RESULT.exists() else []
    key = ("engine", "ranks", "case")
    new = {tuple(row[k] for k in key) for row in found}
    rows = [row for row in before if tuple(row[k] for k in key) not in new] + found
    rows.sort(key=lambda row: (row["ranks"], ENGINES.index(row["engine"])))
    loss, adapter = "loss, largest relative difference", "adapter, difference over movement"
    allowed = "allowed on two ranks"
    cells = [
        [r["engine"], r["ranks"], r["case"], f"{r[loss]:.1e}", f"{r[adapter]:.1e}", f"{r[allowed]:.0e}"] for r in rows
    ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    record = {
        "command": "python -m benchmarks.engines",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "machine": f"{platform.machine()}, CPU only",
        "torch": torch.__version__,
        "measured": rows,
        "table": {
            "columns": ["engine", "ranks", "case", "loss differs by", "adapter differs by", "tests allow"],
            "columns_zh": ["引擎", "进程数", "情形", "损失相差", "适配器相差", "测试允许"],
            "rows": cells,
        },
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--inside", nargs=5)
    given = parser.parse_args()
    if given.inside:
        base, data, output, engine, ranks = given.inside
        sys.exit(guarded(lambda: inside(Path(base), Path(data), Path(output), engine, int(ranks))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, data = prepare(folder)
        for ranks in given.ranks:
            for engine in given.engines:
                write(measure(folder, [engine], ranks, base, data))


if __name__ == "__main__":
    main()
