"""``cogtune bench loader``: can data workers keep up with a card that takes a given number of samples per second?"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cogtune.bench.models import model_config
from cogtune.bench.report import Results
from cogtune.bench.rows import PRESETS, synthetic_rows
from cogtune.configuration.resolve import resolve_workers
from cogtune.configuration.run_config import RunConfig
from cogtune.data.loader import batches
from cogtune.data.records import ImageRef
from cogtune.data.sampler import EpochSampler
from cogtune.features.file_format import Layout
from cogtune.features.store import Store
from cogtune.features.variant import make_variant
from cogtune.language import tr

_WARM = 2.0  # seconds until the workers have started and their queues are full


def measure_loader(
    config: RunConfig, results: Results, *, rate: float, seconds: float, pictures: int, side: int
) -> None:
    """Take ``rate`` samples per second for ``seconds``, from pictures of ``side`` pixels and from cached features."""
    for cached in (False, True):
        with tempfile.TemporaryDirectory() as name:
            row = _measure(config, Path(name), cached, rate, seconds, pictures, side)
        results.add(row)
        print(
            tr(
                "{name}: waits {wait_share:.2f} % at {rate:g} samples/s, {workers} workers; at most"
                " {most_samples_per_second:.1f} samples/s",
                name=row["name"],
                wait_share=100 * row["wait_share"],
                rate=rate,
                workers=row["workers"],
                most_samples_per_second=row["most_samples_per_second"],
            )
        )


def _measure(
    config: RunConfig, folder: Path, cached: bool, rate: float, seconds: float, pictures: int, side: int
) -> dict[str, Any]:
    model = model_config(config.model.path)
    rows = synthetic_rows(PRESETS["s400"], pictures, model, folder / "pictures", side=8 if cached else side)
    if cached:
        images = {image for shown in rows.images for image in shown}
        rows.use_features(_stored(model, _stored_in(config), folder / "features", images))
    workers, size = resolve_workers(config.data.workers), config.train.batch_size
    on_gpu = torch.cuda.is_available()

    def stream() -> Any:
        sampler = EpochSampler(len(rows), size, 0, 1, 0, epochs=2**20)
        return iter(batches(rows, sampler, workers, for_gpu=on_gpu))

    source, waited, taken = stream(), 0.0, 0
    began = due = time.perf_counter() + _WARM
    next(source)
    time.sleep(max(0.0, began - time.perf_counter()))
    while due - began < seconds:
        asked = time.perf_counter()
        next(source)
        waited += time.perf_counter() - asked
        taken += size
        due += size / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        due = max(due, time.perf_counter())  # a card that had to wait does not work faster afterwards
    took = time.perf_counter() - began
    began, most = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(source)
        most += size
    fastest = most / (time.perf_counter() - began)
    return {
        "name": tr("cached features, {stored_in}", stored_in=_stored_in(config)) if cached else f"jpeg {side} px",
        "asked_samples_per_second": rate, "taken": taken, "wait_share": round(waited / took, 5),
        "workers": workers, "batch_size": size,
        "most_samples_per_second": round(fastest, 2), "pictures": pictures,
    }  # fmt: skip


def _stored_in(config: RunConfig) -> str:
    """Return the number format of the cache's files; auto: what a GPU computes in."""
    return "bfloat16" if config.data.cache_dtype == "auto" else config.data.cache_dtype


def _stored(model: Any, stored: str, root: Path, images: set[ImageRef]) -> Any:
    """Return random features of every picture in a feature cache's own files."""
    store = Store(root, make_variant("random", model, "bfloat16", stored))
    store.prepare("random")
    layout: Layout = store.variant.layout
    digests = {}
    generator = torch.Generator().manual_seed(0)
    for number, image in enumerate(sorted(images)):
        digest = f"{number:064x}"
        features = torch.randn(layout.cells, layout.width, generator=generator).bfloat16()
        store.write(digest, features)
        digests[image] = digest
    return lambda image: store.read(digests[image])
