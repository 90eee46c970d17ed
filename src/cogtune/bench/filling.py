"""``cogtune bench fill``: how fast the feature cache fills, including file reads and writes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cogtune.bench.clock import memory_gib, reset_peak, wait
from cogtune.bench.models import RANDOM, model_config
from cogtune.bench.report import Results
from cogtune.bench.rows import preset, synthetic_rows
from cogtune.checkpoint.quantize import require_packages
from cogtune.checkpoint.random import random_weights
from cogtune.configuration.load import with_values
from cogtune.configuration.resolve import resolve_cache_batch, resolve_compile, resolve_workers, torch_dtype
from cogtune.configuration.run_config import RunConfig
from cogtune.data.records import ImageRef
from cogtune.features.cache import FeatureCache, FillReport
from cogtune.features.fill import FillSettings, Tower
from cogtune.features.variant import make_variant
from cogtune.language import tr
from cogtune.model.compile import can_compile, compile_layers, prepare_compiling
from cogtune.train import engines
from cogtune.train.engines.base import Engine
from cogtune.train.feature_cache import fill, open_cache
from cogtune.train.memory_plan import filling_placement


def measure_filling(config: RunConfig, results: Results, *, pictures: int, side: int) -> None:
    """Fill an empty cache from noise pictures of ``side`` pixels, once to warm up (a few pictures) and once
    measured.
    """
    engine = engines.start(config)
    dtype, model = torch_dtype(config.model.dtype, engine.device), model_config(config.model.path)
    reset_peak(engine.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = synthetic_rows(preset("vqa1"), pictures + 4, model, folder / "pictures", side=side)
        images = sorted({image for shown in rows.images for image in shown})
        if config.model.path in RANDOM:
            row = _random(config, engine, dtype, images, folder)
        else:
            row = _from_checkpoint(config, engine, dtype, images, folder)
    allocated, reserved, driver = memory_gib(engine.device)
    row |= {"allocated_gib": round(allocated, 3), "reserved_gib": round(reserved, 3)}
    row |= {"driver_gib": None if driver is None else round(driver, 3), "side": side}
    row["batch"] = resolve_cache_batch(config.data.cache_batch, frames=model.numbered_images)
    results.add({"name": "fill", **row})
    print(
        tr(
            "{pictures_per_second:.2f} pictures/s, {peak_reserved_gib:.2f} GiB reserved",
            pictures_per_second=row["pictures_per_second"],
            peak_reserved_gib=row["peak_reserved_gib"],
        )
    )


def _random(
    config: RunConfig, engine: Engine, dtype: torch.dtype, images: list[ImageRef], folder: Path
) -> dict[str, Any]:
    """Measure with random weights and the tower alone: the decoder is freed before filling."""
    began = time.perf_counter()
    quantization, model = config.quant, model_config(config.model.path)
    require_packages(quantization)
    placement = filling_placement(config, model, engine.device)
    model.num_hidden_layers = 1  # the decoder is freed before it is used
    base = random_weights(model, dtype, engine.device, quantization=quantization, placement=placement)
    if resolve_compile(config.train.compile, "single", able=can_compile(engine.device)):
        prepare_compiling(engine.device)
        compile_layers(base)
    vision: Any = base.model.vision
    stored = str(dtype).removeprefix("torch.")
    variant = make_variant("random", base.config, stored, stored)
    del base
    wait(engine.device)
    load = time.perf_counter() - began
    reset_peak(engine.device)
    settings = FillSettings(
        image_size=model_config(config.model.path).image_size,
        max_pixels=config.data.max_pixels,
        batch=resolve_cache_batch(config.data.cache_batch, frames=model_config(config.model.path).numbered_images),
        workers=max(1, resolve_workers(config.data.workers)),
    )

    def tower() -> Tower:
        found: Tower = vision.features
        return found

    reports = []
    for part in (images[:4], images[4:]):
        cache = FeatureCache(folder / "features", variant, set(part), engine.group)
        reports.append(cache.fill(tower, settings, engine.device, "random", print))
    return _numbers(reports[-1], load)


def _from_checkpoint(
    config: RunConfig, engine: Engine, dtype: torch.dtype, images: list[ImageRef], folder: Path
) -> dict[str, Any]:
    """Measure as in a run: each filling loads the tower, which counts in its peak memory but not in its speed."""
    config = with_values(config, {"data.cache_dir": str(folder / "features")})
    began, reports = time.perf_counter(), []
    for part in (images[:4], images[4:]):
        cache = open_cache(config, model_config(config.model.path), set(part), engine.group, dtype)
        reports.append(fill(config, cache, engine.group, dtype))
    load = time.perf_counter() - began - sum(report.seconds for report in reports)
    return _numbers(reports[-1], load / len(reports))


def _numbers(report: FillReport, load: float) -> dict[str, Any]:
    return {
        "pictures": report.computed,
        "seconds": round(report.seconds, 3),
        "pictures_per_second": round(report.rate, 3),
        "load_s": round(load, 2),
        "peak_reserved_gib": round(report.peak_bytes / 2**30, 3),
    }
