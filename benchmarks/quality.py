"""What fewer bits cost in right answers: the demo's task, trained on each kind of frozen weights or cached features.

    python -m benchmarks.quality benchmarks/results/quality.json [--rows nf4,fp8] [--folder DIR] [--together 4]

Every row is the run of ``cogtune demo`` (base, easy-VQA, settings, seed) with one change: the number format of the
frozen linear layers of the experts, and of the tower where the name says so; or that of cached features. The adapter
answers the test questions on the weights it was trained on, and once more on the plain ones. A row is a process of its
own and is written when it ends; one that is in the file without an error is not run again (``--again`` does), and with
``--folder`` a run that was stopped goes on. Needs easy-vqa (any folder on PYTHONPATH that holds the installed package
will do) and no network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from cogtune.bench.report import Results, circumstances, shown_command
from cogtune.configuration.quantization import PLAIN
from cogtune.configuration.run_config import RunConfig
from cogtune.demo import easyvqa
from cogtune.demo.base import BASE
from cogtune.demo.record import Clock, use_all_cores, write_json
from cogtune.demo.run import Folders, settings
from cogtune.demo.score import measure
from cogtune.evaluate.run_folder import read_metrics
from cogtune.generate.loading import load_generator
from cogtune.train.run import train

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4": {"quant.experts": "nf4"},
    "nf4-tower": {"quant.experts": "nf4", "quant.tower": "nf4"},
    "fp8": {"quant.experts": "fp8"},
    "fp8-tower": {"quant.experts": "fp8", "quant.tower": "fp8"},
    "int8": {"quant.experts": "int8"},
    "int8-tower": {"quant.experts": "int8", "quant.tower": "int8"},
    "cached": {"data.cache_features": "on"},
    "cached-float8": {"data.cache_features": "on", "data.cache_dtype": "float8"},
}
"""A row's name and the configuration keys that differ from the demo's."""
ALLOWED_POINTS = 2.0  # of the quantised rows below the plain one, in percentage points
_SHOWN = ("dtype", "accuracy", "on_plain_weights", "validation")


def run_row(name: str, folder: Path, dtype: str, limits: tuple[int | None, int | None]) -> dict[str, Any]:
    """Train and ask one variant in ``folder``, which may hold a run of it that was stopped."""
    use_all_cores()
    source, folders = easyvqa.find_easy_vqa(), Folders(folder)
    training, test = (easyvqa.read_split(source, split, limit)
                      for split, limit in zip(easyvqa.SPLITS, limits, strict=True))  # fmt: skip
    easyvqa.write_folder(training, folders.train_data)
    # compiling takes longer than this model's whole training; a CPU does not compile in any case
    features = str(folder / "features")
    changes = {"model.dtype": dtype, "train.compile": False, "data.cache_dir": features, **VARIANTS[name]}
    config = settings(folders, changes)
    clock = Clock()
    result = train(config)
    assert result.adapter is not None
    times = {"training": clock.read()}
    quantization, clock = config.quant, Clock()
    keys = {"model.dtype": dtype}
    generator = load_generator(BASE, adapter=result.adapter, keys=keys | {"quant": quantization.model_dump()})
    row: dict[str, Any] = {"name": name, "changes": VARIANTS[name], **_where(generator.model)}
    row |= measure(generator, test).to_dict()
    times["answers"] = clock.read()
    if quantization == PLAIN:
        row["on_plain_weights"] = row["accuracy"]
    else:
        plain = load_generator(BASE, adapter=result.adapter, keys=keys)
        row["on_plain_weights"] = measure(plain, test).accuracy
    return row | {"steps": result.steps, "times": times, "settings": _settings(config), **_curves(folders.run)}


def _where(model: torch.nn.Module) -> dict[str, Any]:
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    return {"dtype": str(embedding.dtype).removeprefix("torch."), "device": embedding.device.type}


def _settings(config: RunConfig) -> dict[str, Any]:
    used = config.model_dump(mode="json")
    del used["data"]["path"], used["data"]["cache_dir"], used["train"]["output"]  # folders of this machine
    return {section: used[section] for section in ("lora", "train", "eval", "data", "quant")}


def _curves(run: Path) -> dict[str, Any]:
    """Loss by step, of training (means of ten steps) and of the validation pictures."""
    lines = read_metrics(run)
    curves = {kind: [[line["step"], round(line["loss"], 5)] for line in lines if line["kind"] == kind]
              for kind in ("train", "validation")}  # fmt: skip
    last = curves["validation"][-1][1] if curves["validation"] else None
    return {"loss": {"last": curves["train"][-1][1], "validation": last}, "curves": curves}


def _in_own_process(name: str, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """The row as another process leaves it, or the last line of what it said when it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    row, log = folder / "row.json", folder / "output.log"
    row.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "benchmarks.quality", str(row), "--row", name, "--folder", str(folder)]
    with log.open("w", encoding="utf-8") as said:
        code = subprocess.run([*command, *options], stdout=said, stderr=subprocess.STDOUT, check=False).returncode
    if row.is_file():
        found: dict[str, Any] = json.loads(row.read_text(encoding="utf-8"))
        return found
    lines = log.read_text(encoding="utf-8").strip().splitlines() or [""]
    return {"name": name, "changes": VARIANTS[name], "error": f"exit {code}: {lines[-1]}"}


def run_all(names: Sequence[str], results: Results, folder: Path, options: Sequence[str], together: int) -> None:
    """Every row in a process of its own, ``together`` at a time; each is kept and printed as it ends."""

    lock = Lock()

    def one(name: str) -> None:
        print(f"{name}: began; {folder / name / 'output.log'}", flush=True)
        row = _in_own_process(name, folder / name, options)
        with lock:
            results.add(row)
        shown = {**row, **row.get("loss", {})}
        text = row.get("error") or ", ".join(f"{key} {shown[key]}" for key in _SHOWN)
        print(f"{name}: {text}", flush=True)

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(one, names))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the JSON file")
    parser.add_argument("--rows", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}; comma-separated")
    parser.add_argument("--folder", type=Path, help="where the runs write; kept (default: a temporary folder)")
    parser.add_argument("--together", type=int, default=1, help="rows at a time, on one GPU with cores to spare")
    parser.add_argument("--dtype", default="auto", help="of the computation: auto is bfloat16 on a GPU, else float32")
    parser.add_argument("--pictures", type=int, nargs=2, metavar=("TRAIN", "TEST"), help="only so many, for a try")
    parser.add_argument("--again", action="store_true", help="also rows that the file has already")
    parser.add_argument("--row", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the rows that are asked for and not yet in the file."""
    given = _arguments()
    typed = shown_command(["python", "-m", "benchmarks.quality", *sys.argv[1:]])
    if given.row:
        limits = tuple(given.pictures or (None, None))
        about = {key: circumstances(typed)[key] for key in ("date", "commit", "card", "machine")}
        write_json(given.target, {**run_row(given.row, given.folder, given.dtype, limits), **about})
        return
    names = given.rows.split(",")
    if unknown := sorted(set(names) - VARIANTS.keys()):
        raise SystemExit(f"no row {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    results = Results("quality", typed, given.target)
    results.record["versions"]["easy-vqa"] = metadata.version(easyvqa.PACKAGE)
    results.record["allowed_points"] = ALLOWED_POINTS
    if given.target.is_file():
        results.rows.extend(json.loads(given.target.read_text(encoding="utf-8"))["rows"])
    done = set() if given.again else {row["name"] for row in results.rows if "error" not in row}
    options = ["--dtype", given.dtype]
    if given.pictures:
        options += ["--pictures", *map(str, given.pictures)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        run_all([name for name in names if name not in done], results, folder, options, given.together)


if __name__ == "__main__":
    main()
