"""What fewer bits cost in right answers: one task, trained on each number format with three seeds.

    python -m benchmarks.quality benchmarks/results/quality.json [--rows nf4,fp8] [--together 12] [--folder DIR]

The demo's tiny base describes drawings of one shape ("a small red triangle in the top left"); an answer is right if all
of it is. The base was trained for that, so its answers before any training show what rounding its weights costs; LoRA
on new drawings then shows what training wins back. The demo's own task tells less: there every format ends at 99 %.
Here some shapes are a few pixels wide, and none comes near.

A row is a number format of the frozen linear layers (or of cached features, or another place for the adapter), and a
process of its own. It is written after each seed; one that is whole in the file is not run again (``--again`` does).
Every adapter answers on the weights it was trained on, and once more on unquantised ones. All rows train on the same
drawings and answer the same test drawings. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch.nn import functional

import cogtune
from benchmarks.quality_view import packed
from cogtune.bench.report import Results, circumstances, shown_command
from cogtune.configuration.quantization import PLAIN
from cogtune.configuration.run_config import RunConfig
from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.data.collate import collate
from cogtune.data.dataset import RowSample
from cogtune.demo.base import BASE
from cogtune.demo.drawings import DESCRIBE, Drawing, draw
from cogtune.demo.record import Clock, write_json
from cogtune.evaluate.run_folder import read_metrics
from cogtune.generate.generator import Generator
from cogtune.generate.loading import load_generator
from cogtune.processing.image import preprocess
from cogtune.processing.tree import build_tree

EVERYWHERE = {"lora.targets": "experts,vision-tower,glu-adapter"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"quant.experts": "int8"},
    "int8-tower": {"quant.experts": "int8", "quant.tower": "int8"},
    "fp8": {"quant.experts": "fp8"},
    "fp8-tower": {"quant.experts": "fp8", "quant.tower": "fp8"},
    "nf4": {"quant.experts": "nf4"},
    "nf4-tower": {"quant.experts": "nf4", "quant.tower": "nf4"},
    "fp4-tower": {"quant.experts": "fp4", "quant.tower": "fp4"},
    "cached-float8": {"data.cache_features": "on", "data.cache_dtype": "float8"},
    "plain-everywhere": EVERYWHERE,
    "nf4-everywhere": {"quant.experts": "nf4", "quant.tower": "nf4", **EVERYWHERE},
}
"""A row's name and the configuration keys that differ from `SETTINGS`."""
SETTINGS: dict[str, Any] = {
    "data.validation_share": 0,
    "data.cache_features": "off",
    "data.workers": 0,
    "data.cache_batch": 64,
    "lora.targets": "experts",
    "lora.rank": 16,
    "train.epochs": 1,
    "train.batch_size": 32,
    "train.lr": 1e-3,
    "train.save_steps": 100_000,
    "train.compile": False,  # takes longer than this model's whole training; a CPU does not compile in any case
    "log.tensorboard": False,
}
SEEDS = (1, 2, 3)
TRAIN, TEST = 6_400, 10_000  # drawings
TRAIN_SEED, TEST_SEED = 11, 1_000_003  # neither is the base's own (demo.pretrain.SEED)
_AT_ONCE = 500
_PLAIN = {"quant.experts": "none", "quant.tower": "none"}  # unsaid, an adapter brings the formats of its training along


def drawings(seed: int, count: int) -> list[Drawing]:
    """Return random drawings, the same for the same seed."""
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]


def write_folder(target: Path, drawn: Sequence[Drawing]) -> None:
    """Write drawings and their descriptions as a data folder; one that is there is kept."""
    if (target / "labels.jsonl").is_file():
        return
    (target / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, drawing in enumerate(drawn):
        name = f"images/{number:05}.png"
        drawing.image.save(target / name)
        turns = [{"role": "user", "content": DESCRIBE[0]}, {"role": "assistant", "content": drawing.description}]
        lines.append(json.dumps({"image": name, "conversations": turns}))
    (target / "labels.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Test:
    """Drawings with right descriptions, and how well a model knows them."""

    def __init__(self, drawn: Sequence[Drawing], generator: Generator) -> None:
        encoder, side = generator.processor.encoder, generator.processor.image_size
        rows = [RowSample(build_tree([encoder.encode(DESCRIBE[0], answer=drawing.description)]),
                          (preprocess(drawing.image, side),), ()) for drawing in drawn]  # fmt: skip
        self.batches = [collate(rows[start : start + _AT_ONCE]) for start in range(0, len(rows), _AT_ONCE)]
        for batch in self.batches:
            del batch["record_ids"], batch["num_labels"]

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the share of wholly right answers, the loss per token of the right ones, and which were right.

        The most likely token is right at every place of the right answer, its end included, exactly if greedy
        generation gives that answer. So one forward pass over the right answers takes generation's place.
        """
        model.eval()
        device = next(model.parameters()).device
        right, losses = list[torch.Tensor](), list[torch.Tensor]()
        for batch in self.batches:
            labels = batch["labels"][:, 1:].to(device)
            logits = model(**{name: value.to(device) for name, value in batch.items()}, return_logits=True).logits
            logits, answered = logits[:, :-1].float(), labels != IGNORED_LABEL
            right.append(((logits.argmax(-1) == labels) | ~answered).all(1))
            losses.append(functional.cross_entropy(logits[answered], labels[answered], reduction="none"))
        hits = torch.cat(right).cpu().numpy()
        return {"accuracy": float(hits.mean()), "loss": float(torch.cat(losses).double().mean()), "right": packed(hits)}


def run_row(
    name: str, folder: Path, dtype: str, counts: tuple[int, int], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Measure one format untuned, then train and measure it with each seed; yield the row after each."""
    clock = Clock()
    keys = {"model.dtype": dtype}
    quantised = {key: value for key, value in VARIANTS[name].items() if key.startswith("quant.")}
    generator = load_generator(BASE, keys=keys | quantised)
    test = Test(drawings(TEST_SEED, counts[1]), generator)
    row: dict[str, Any] = {"name": name, "changes": VARIANTS[name], **_where(generator.model), "total": counts[1]}
    row["untuned"] = test.measure(generator.model)
    times, row["seeds"] = {"untuned": clock.read()}, list[Any]()
    for seed in seeds:
        clock = Clock()
        run = folder / f"seed-{seed}"
        given = {"model": str(BASE), "data": str(folder.parent / "train"), "output": str(run), "train.seed": seed,
                 "data.cache_dir": str(folder / "features")}  # fmt: skip
        config = cogtune.load_config(None, given | keys | SETTINGS | VARIANTS[name])
        result = cogtune.train(config)
        assert result.adapter is not None
        times[f"training {seed}"], clock = clock.read(), Clock()
        found: dict[str, Any] = {
            "seed": seed,
            "steps": result.steps,
            "training_loss": result.loss,
            "curve": _curve(run),
        }
        found |= test.measure(load_generator(BASE, adapter=result.adapter, keys=keys | quantised).model)
        if config.quant != PLAIN:
            plain = test.measure(load_generator(BASE, adapter=result.adapter, keys=keys | _PLAIN).model)
            found["on_plain_weights"] = {key: plain[key] for key in ("accuracy", "loss")}
        row["seeds"].append(found)
        times[f"answers {seed}"] = clock.read()
        yield row | {"times": times, "settings": _settings(config)}


def _where(model: torch.nn.Module) -> dict[str, Any]:
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    return {"dtype": str(embedding.dtype).removeprefix("torch."), "device": embedding.device.type}


def _settings(config: RunConfig) -> dict[str, Any]:
    used = config.model_dump(mode="json")
    del used["data"]["path"], used["data"]["cache_dir"], used["train"]["output"]  # folders of this machine
    return {section: used[section] for section in ("lora", "train", "data", "quant")}


def _curve(run: Path) -> list[list[float]]:
    """Training loss by step, each the mean since the one before."""
    return [[line["step"], round(line["loss"], 5)] for line in read_metrics(run) if line["kind"] == "train"]


def _said(row: dict[str, Any]) -> str:
    def both(found: dict[str, Any]) -> str:
        return f"{100 * found['accuracy']:.2f} % (loss {found['loss']:.4f})"

    return f"untuned {both(row['untuned'])}, tuned {', '.join(map(both, row['seeds']))}"


def run_all(names: Sequence[str], results: Results, folder: Path, options: Sequence[str], together: int) -> None:
    """Every row in a process of its own, ``together`` at a time; what one has measured is kept after each seed."""
    lock = Lock()

    def keep(row: dict[str, Any]) -> None:
        with lock:
            results.add(row)
            results.rows.sort(key=lambda one: [*VARIANTS].index(one["name"]))
            results.write()

    def one(name: str) -> None:
        print(f"{name}: began; {folder / name / 'output.log'}", flush=True)
        for row in _in_own_process(name, folder / name, options):
            keep(row)
            print(f"{name}: {row.get('error') or _said(row)}", flush=True)

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(one, names))


def _in_own_process(name: str, folder: Path, options: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the row as another process leaves it after each seed, or the last line of what it said when it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "row.json", folder / "output.log"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "benchmarks.quality", str(file), "--row", name, "--folder", str(folder)]
    with log.open("w", encoding="utf-8") as said:
        process, seen = subprocess.Popen([*command, *options], stdout=said, stderr=subprocess.STDOUT), 0
        while True:
            code = process.poll()
            row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"seeds": []}
            if len(row["seeds"]) > seen:
                seen = len(row["seeds"])
                yield row
            if code is not None:
                break
            time.sleep(1)
    if code:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or [""]
        yield {"name": name, "changes": VARIANTS[name], "error": f"exit {code}: {lines[-1]}"}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the JSON file")
    parser.add_argument("--rows", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}; comma-separated")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="a training for each")
    parser.add_argument("--folder", type=Path, help="where the runs write; kept (default: a temporary folder)")
    parser.add_argument("--together", type=int, default=1, help="rows at a time, on one GPU with cores to spare")
    parser.add_argument("--dtype", default="auto", help="of the computation: auto is bfloat16 on a GPU, else float32")
    parser.add_argument("--drawings", type=int, nargs=2, metavar=("TRAIN", "TEST"), default=(TRAIN, TEST))
    parser.add_argument("--again", action="store_true", help="also rows that the file has already")
    parser.add_argument("--row", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the rows that are asked for and not yet in the file."""
    given = _arguments()
    typed = shown_command(["python", "-m", "benchmarks.quality", *sys.argv[1:]])
    if given.row:
        about = {key: circumstances(typed)[key] for key in ("date", "commit", "card", "machine")}
        for row in run_row(given.row, given.folder, given.dtype, tuple(given.drawings), given.seeds):
            write_json(given.target, {**row, **about})
            print(_said(row), flush=True)
        return
    names = given.rows.split(",")
    if unknown := sorted(set(names) - VARIANTS.keys()):
        raise SystemExit(f"no row {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    results = Results("quality", typed, given.target)
    if given.target.is_file():
        results.rows.extend(json.loads(given.target.read_text(encoding="utf-8"))["rows"])
    done = {row["name"] for row in results.rows if not given.again and len(row.get("seeds", ())) == len(given.seeds)}
    options = list(_options(given))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        write_folder(folder / "train", drawings(TRAIN_SEED, given.drawings[0]))
        run_all([name for name in names if name not in done], results, folder, options, given.together)


def _options(given: argparse.Namespace) -> Iterator[str]:
    yield from ("--dtype", given.dtype)
    yield from ("--drawings", *map(str, given.drawings))
    yield from ("--seeds", *map(str, given.seeds))


if __name__ == "__main__":
    main()
