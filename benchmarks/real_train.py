"""A real ``train`` against the bench of the same shape, in one process on one card.

    python -m benchmarks.real_train real-train-h200.json

A folder of generated pictures (JPEG and PNG, of many sizes) with one question each, 320 to 960 text tokens, 640 in the
mean, is trained on for a few epochs at the full size, with features from the cache, then with the tower. Everything is
a user's run: data, workers, plan, feature cache, loop, metrics, TensorBoard, adapter. Only the weights are random,
made on the card instead of read from 39 GB of files. For each of the two there are three rows:

- *bench*: what ``cogtune bench train`` measures, rows of exactly 640 text tokens;
- *same batches*: the run's own batches, made beforehand: what the many lengths cost;
- *train*: the run itself, from its second epoch on: what loading, logging and metrics cost.
"""

from __future__ import annotations

from cogtune.system.allocator import prepare_allocator

prepare_allocator()  # before torch is imported, as the command line does

import argparse  # noqa: E402
import gc  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import string  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from itertools import islice  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from cogtune.bench.checkpoint import make_outline  # noqa: E402
from cogtune.bench.clock import Timing  # noqa: E402
from cogtune.bench.data_folder import dialogue, write_label  # noqa: E402
from cogtune.bench.report import Results, shown_command, table  # noqa: E402
from cogtune.bench.steps import Bench  # noqa: E402
from cogtune.bench.variants import Variant, parse_variants  # noqa: E402
from cogtune.checkpoint.model_files import load_model_config  # noqa: E402
from cogtune.checkpoint.random import random_weights  # noqa: E402
from cogtune.configuration.load import load_config  # noqa: E402
from cogtune.configuration.run_config import RunConfig  # noqa: E402
from cogtune.data.training_rows import load_rows  # noqa: E402
from cogtune.distributed.group import Group  # noqa: E402
from cogtune.evaluate.run_folder import read_metrics  # noqa: E402
from cogtune.model.compile import compiled_graphs  # noqa: E402
from cogtune.model.modeling import CogVLM2ForCausalLM  # noqa: E402
from cogtune.model.vision import VisionModel  # noqa: E402
from cogtune.train.batches import Batch, Feed  # noqa: E402
from cogtune.train.run import train  # noqa: E402

TEXT, SPREAD = 640, 320
"""Text tokens of a row in the mean, and how far the shortest and the longest are from it."""
SIZES = ((640, 480), (1920, 1080), (4000, 3000), (500, 900), (1280, 960), (3024, 4032), (336, 336), (2560, 1440))
"""Width and height of the pictures, in turns. Every third file below two megapixels is a PNG."""
EVERY = 4
"""Steps of a line of metrics."""
_TEMPLATE = len("Question:  Answer:")


def write_data(folder: Path, rows: int, seed: int = 0) -> Path:
    """Write ``rows`` pictures in the published layout, each with a question and an answer of random letters.

    With a byte tokenizer a letter is a token; lengths come in pairs around `TEXT`, so their mean is exact.
    """
    words = random.Random(seed)
    spread = [words.randint(0, SPREAD) for _ in range((rows + 1) // 2)]
    lengths = [TEXT + sign * far for far in spread for sign in (1, -1)][:rows]
    words.shuffle(lengths)
    for number, length in enumerate(lengths):
        answer = length // 2
        texts = ("".join(words.choices(string.ascii_letters, k=k)) for k in (length - answer - _TEMPLATE, answer - 1))
        write_label(folder / "labels" / f"{number:04}.json", dialogue(*texts))
    (folder / "images").mkdir()
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda number: _picture(folder / "images", number), range(rows)))
    return folder


def _picture(folder: Path, number: int) -> None:
    """Write smooth noise, which decodes as slowly as a photograph."""
    width, height = SIZES[number % len(SIZES)]
    generator = torch.Generator().manual_seed(number)
    coarse = torch.randint(0, 256, (height // 8, width // 8, 3), dtype=torch.uint8, generator=generator)
    image = Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BILINEAR)
    if number % 3 == 0 and width * height < 2_000_000:
        image.save(folder / f"{number:04}.png", compress_level=1)
    else:
        image.save(folder / f"{number:04}.jpg", quality=90)


def run_config(base: Path, data: Path, output: Path, **more: Any) -> RunConfig:
    """Return the run's configuration: the bench's adapter, everything else as a user has it by default."""
    keys = {
        "model.path": base, "data.path": data, "data.validation_share": 0, "data.cache_dir": output.parent / "cache",
        "train.output": output, "train.batch_size": 2, "train.gradient_checkpointing": "none",
        "train.save_steps": 100_000, "lora.targets": "vision_expert_query_key_value", "lora.rank": 8,
        "log.steps": EVERY,
    }  # fmt: skip
    return load_config(None, {name: str(value) for name, value in {**keys, **more}.items()})


@contextmanager
def random_base() -> Iterator[None]:
    """Let runs make their base's weights on its device instead of reading the holes of an outline."""

    def model(path: str, *, rope_precision: str | None, vision_tower: bool, progress: Any, **how: Any) -> Any:
        dtype, device = how.pop("dtype"), how.pop("device")
        made: CogVLM2ForCausalLM = random_weights(load_model_config(path), dtype, device, tower=vision_tower, **how)
        made.config.name_or_path = path
        return made

    def tower(path: Path, *, dtype: torch.dtype, device: torch.device, **how: Any) -> VisionModel:
        config = load_model_config(path)
        config.num_hidden_layers = 1  # the decoder is freed before the tower runs
        vision: VisionModel = random_weights(config, dtype, torch.device(device), **how).model.vision
        return vision

    with (
        mock.patch("cogtune.train.model_setup.load_model", model),
        mock.patch("cogtune.train.feature_cache.load_tower", tower),
    ):
        yield


def shape_of(batch: Batch) -> str:
    """Name what attention plans a kernel for: rows, their columns, and the queries of the last layer."""
    routing = batch["routing"]
    columns = routing.query_columns
    return f"{routing.num_rows} x {routing.num_columns}" + ("" if columns is None else f", {columns.shape[1]} queries")


def made_beforehand(config: RunConfig, steps: int, *, cached: bool, dtype: torch.dtype) -> list[Batch]:
    """Return the first batches of a run, in its order; ``cached``: with random features instead of pixels."""
    rows, group = load_rows(config), Group.alone()
    if cached:
        model = load_model_config(config.model.path)
        vision: Any = model.vision_config
        features = torch.randn(model.grid**2, vision.hidden_size).to(dtype)
        rows.use_features(lambda image: features.clone())
    return [step.batches[0] for step in islice(Feed(rows, config, group, 1).steps((0, 0)), steps)]


def bench_rows(base: str, work: Path, run: RunConfig, steps: int, *, cached: bool) -> Iterator[dict[str, Any]]:
    """Measure the bench's fixed shape and the run's own batches on one assembled model."""
    overrides = {"model.path": [base], "train.batch_size": ["2"]}
    features = "cached" if cached else "live"
    variant = parse_variants([f"{features} features={features}"], overrides, preset=f"text={TEXT}", cached=cached)[0]
    bench = Bench(variant, cached=cached)
    batches = bench.batches(variant, work / "bench")
    timing = bench.run(variant, batches, warm=3, steps=10 if cached else 6)
    row = _row(f"bench, {features}", timing, batches, 1000 * timing.median)
    times = [round(1000 * seconds, 1) for seconds in timing.steps]
    yield row | {"first_step_s": round(timing.first, 2), "times_ms": times, "shapes": 1}
    yield _same_batches(bench, variant, run, steps)


def _same_batches(bench: Bench, variant: Variant, run: RunConfig, steps: int) -> dict[str, Any]:
    """Run the run's own batches: the mean of the second half's steps, and what a step of a new shape takes longer."""
    batches = made_beforehand(run, steps, cached=variant.cached, dtype=bench.dtype)
    timing = bench.run(variant, batches, warm=1, steps=steps - 1)
    times, seen = [1000 * seconds for seconds in timing.steps], {shape_of(batches[0])}
    first, again = list[float](), list[float]()  # milliseconds a token
    for batch, ms in zip(batches[1:], times, strict=True):
        (again if shape_of(batch) in seen else first).append(ms / _tokens([batch]))
        seen.add(shape_of(batch))
    half = steps // 2
    row = _row(f"same batches, {variant.name}", timing, batches[-half:], statistics.mean(times[-half:]))
    usual = statistics.median(again) if again else 0.0
    mean = _tokens(batches) / len(batches)
    extra = [round((each - usual) * mean, 1) for each in first] if again else []
    return row | {"times_ms": [round(ms, 1) for ms in times], "shapes": len(seen), "extra_ms_of_new_shapes": extra}


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def _row(name: str, timing: Timing, batches: Sequence[Batch], ms: float) -> dict[str, Any]:
    rows = batches[0]["input_ids"].shape[0]
    return {
        "name": name, "ms": round(ms, 2), "samples_per_second": round(1000 * rows / ms, 3),
        "tokens_per_second": round(1000 * _tokens(batches) / len(batches) / ms, 1),
        "data_wait_share": round(sum(timing.waits) / sum(timing.steps), 5),
        "graphs": timing.warm_graphs + timing.recompiled, "reserved_gib": round(timing.reserved, 2),
    }  # fmt: skip


def train_row(name: str, config: RunConfig, epoch: int) -> dict[str, Any]:
    """Train, and read the run's own metrics from its second epoch on."""
    graphs, began = compiled_graphs(), time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - began
    lines = [line for line in read_metrics(result.output) if line["kind"] == "train" and line["step"] > epoch]
    rows = config.train.batch_size
    taken = [rows * EVERY / line["samples_per_second"] for line in lines]
    samples = rows * EVERY * len(lines) / sum(taken)
    tokens = sum(line["tokens_per_second"] * each for line, each in zip(lines, taken, strict=True)) / sum(taken)
    waited = sum(line["loader_wait"] * each for line, each in zip(lines, taken, strict=True))
    return {
        "name": name, "ms": round(1000 * rows / samples, 2), "samples_per_second": round(samples, 3),
        "tokens_per_second": round(tokens, 1), "data_wait_share": round(waited / sum(taken), 5),
        "graphs": compiled_graphs() - graphs, "windows_ms": [round(1000 * each / EVERY, 2) for each in taken],
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if torch.cuda.is_available() else None,
        "whole_s": round(seconds, 1),
    }  # fmt: skip


def measure(results: Results, preset: str, rows: int, epochs: int, kinds: Sequence[str], folder: Path) -> None:
    """Add three rows for each of ``kinds`` and print each."""
    began, epoch = time.perf_counter(), rows // 2
    base, data = make_outline(folder / "base", preset=preset), write_data(folder / "data", rows)
    name = "random" if preset == "full" else f"random-{preset}"
    for kind in kinds:
        keys = {"train.epochs": epochs, "data.cache_features": "on" if kind == "cached" else "off"}
        config = run_config(base, data, folder / kind, **keys)
        if "data" not in results.record:
            lengths = load_rows(config).lengths
            results.record["data"] = {
                "rows": rows, "pictures": Counter(path.suffix for path in (data / "images").iterdir()),
                "sizes": SIZES, "mean_row": sum(lengths) / rows, "shortest": min(lengths), "longest": max(lengths),
                "made_s": round(time.perf_counter() - began, 1),
            }  # fmt: skip
        for row in bench_rows(name, folder / f"bench-{kind}", config, 2 * epoch, cached=kind == "cached"):
            results.add(row)
            print(_said(row), flush=True)
        _release()
        with random_base():
            results.add(train_row(f"train, {kind}", config, epoch))
        _release()
        print(_as_table(results.rows), flush=True)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _said(row: Mapping[str, Any]) -> str:
    return f"{row['name']}: {row['ms']:.1f} ms, {row['samples_per_second']:.3f} samples/s, {row['shapes']} shapes"


def _as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows, each beside the bench of its kind, by samples and by tokens."""
    cells = []
    for row in rows:
        anchor = next(other for other in rows if other["name"] == f"bench, {row['name'].split(', ')[1]}")
        cells.append([
            row["name"], f"{row['ms']:.1f}", f"{row['samples_per_second']:.3f}", f"{row['tokens_per_second']:.0f}",
            *(f"{100 * (row[key] / anchor[key] - 1):+.1f} %" for key in ("samples_per_second", "tokens_per_second")),
            f"{100 * row['data_wait_share']:.2f}", row["graphs"], row["reserved_gib"],
        ])  # fmt: skip
    columns = ["row", "ms", "samples/s", "tokens/s", "samples", "tokens", "wait %", "graphs", "reserved"]
    return table(columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--preset", choices=("full", "tiny"), default="full", help="the size of the model")
    parser.add_argument("--rows", type=int, default=16, help="pictures, with a question each; a multiple of 8")
    parser.add_argument("--epochs", type=int, default=3, help="of the runs; the first is warm-up")
    parser.add_argument("--features", choices=("cached", "live", "both"), default="both")
    chosen = parser.parse_args()
    names = ("preset", "rows", "epochs", "features")
    words = [word for name in names for word in (f"--{name}", str(getattr(chosen, name)))]
    results = Results("real-train", f"python -m benchmarks.real_train {shown_command(words)}", chosen.file)
    kinds = ("cached", "live") if chosen.features == "both" else (chosen.features,)
    with tempfile.TemporaryDirectory() as folder:
        measure(results, chosen.preset, chosen.rows, chosen.epochs, kinds, Path(folder))


if __name__ == "__main__":
    main()
