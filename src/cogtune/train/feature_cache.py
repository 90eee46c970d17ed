"""Features of a run's pictures: decide whether to train from the cache, and fill it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from cogtune.adapters.tower import tower_trains
from cogtune.checkpoint.fingerprint import tower_fingerprint
from cogtune.checkpoint.load import load_tower
from cogtune.checkpoint.model_files import load_model_config, reading_rules, whole_folder
from cogtune.configuration.deepspeed import apply_deepspeed
from cogtune.configuration.load import with_values
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.resolve import as_stored, resolve_cache_batch, resolve_compile, resolve_workers, torch_dtype
from cogtune.configuration.run_config import RunConfig
from cogtune.data.records import ImageRef
from cogtune.data.split import read_and_split
from cogtune.distributed import environment
from cogtune.distributed.group import Group
from cogtune.errors import ConfigError
from cogtune.features.cache import FeatureCache, FillReport
from cogtune.features.choose import CacheChoice, Demand, choose, size_text
from cogtune.features.estimate import seconds_per_picture
from cogtune.features.fill import FillSettings, Tower
from cogtune.features.reader import FeatureReader
from cogtune.features.store import default_folder
from cogtune.features.variant import make_variant
from cogtune.language import phrase, tr
from cogtune.model.compile import can_compile, compile_tower, prepare_compiling
from cogtune.system.durations import format_duration
from cogtune.train.batches import Feed
from cogtune.train.failures import phase
from cogtune.train.log import console, log
from cogtune.train.memory_plan import filling_placement
from cogtune.train.progress import Progress
from cogtune.train.run_inputs import Inputs
from cogtune.train.stop_signal import StopSignal

_WORTH_COMPILING = 1000  # pictures; compilation takes up to a minute and makes the tower about 10 % faster
_NARROW = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def ensure(
    config: RunConfig,
    inputs: Inputs,
    feed: Feed,
    group: Group,
    dtype: torch.dtype,
    progress: Progress,
    total: int,
    tower_fits: bool | None = None,
) -> FeatureReader | None:
    """Decide as ``data.cache_features`` says, compute missing features, and return a reader; None: the tower runs.

    Collective. ``progress`` and ``total`` steps determine which data remains; ``tower_fits``: whether the tower fits in
    memory during training, None if that is not known.

    Raises:
        ConfigError, FeatureCacheError: caching was requested and is not possible.
        DataError: a picture that cannot be read.
        DiskFullError: no space for the features.
    """
    asked = config.data.cache_features
    assert not isinstance(asked, bool)
    if asked == "off":
        return None
    model_config = load_model_config(config.model.path)
    if asked == "on":
        _refuse_trained_tower(model_config, config)
    elif tower_trains(model_config, config.lora):
        _say_live(tr("lora.targets train it, so its output changes"))
        return None
    showings, images = _demand(config, inputs, feed, progress, total)
    if not images:
        _say_live(tr("no row has a picture"))
        return None
    with ExitStack() as stack:
        cache = open_cache(config, model_config, images, group, dtype)
        stack.callback(cache.release)
        demand = Demand(showings, cache.lookup.pictures, cache.lookup.to_compute, cache.more_bytes, tower_fits)
        choice = _choose(config, cache, demand)
        if not choice.cached:
            _say_live(choice.reason)
            return None
        log.info(tr("features: trained from the cache: {reason}", reason=choice.reason))
        if demand.to_compute:
            for line in fill(config, cache, group, dtype).lines():
                log.info(tr("features: {line}", line=line))
        reader = cache.reader(dtype)
        stack.pop_all()  # the reader's claim is released by who reads
        return reader


def fill_cache(config: RunConfig) -> FillReport:
    """Compute the features of every picture of the data, validation included, before any run: ``cogtune data cache``.

    Under torchrun all processes share the work. Raises what `ensure` raises with ``data.cache_features: on``, and
    Stopped after a signal; computed features are kept.
    """
    with StopSignal(), console(environment.rank(), config.log.level), ExitStack() as stack:
        config = with_values(
            apply_deepspeed(config, world_size=environment.world_size())[0], {"data.cache_features": "on"}
        )
        model_config = load_model_config(config.model.path)
        config = as_stored(config, config.model.path)
        _refuse_trained_tower(model_config, config)
        split = read_and_split(config.data, config.train.seed, **reading_rules(config.model.path))
        for line in split.report.lines():
            log.info(tr("data: {line}", line=line))
        group = Group.join() if environment.is_launched() else Group.alone()
        images = {image for example in [*split.train, *split.validation] for image in example.images}
        dtype = torch_dtype(config.model.dtype, group.device)
        cache = open_cache(config, model_config, images, group, dtype)
        stack.callback(cache.release)
        lookup = cache.lookup
        _choose(config, cache, Demand(0, lookup.pictures, lookup.to_compute, cache.more_bytes))
        report = fill(config, cache, group, dtype) if lookup.to_compute else FillReport(0, 0, 0.0, 0, ())
        for line in report.lines() if lookup.to_compute else [tr("nothing to compute")]:
            log.info(tr("features: {line}", line=line))
        group.close()
        return report


def _refuse_trained_tower(model_config: CogVLM2Config, config: RunConfig) -> None:
    if tower_trains(model_config, config.lora):
        raise ConfigError(
            tr("lora.targets train the vision tower: its output changes in every step and cannot be cached"),
            hint=tr("set data.cache_features: off, or leave the tower out of lora.targets"),
            code="cache-tower-trains",
        )


def open_cache(
    config: RunConfig, model_config: CogVLM2Config, images: set[ImageRef], group: Group, dtype: torch.dtype
) -> FeatureCache:
    """Open the cache for this run, look up its pictures, and log the present and the final size. Collective."""
    data = config.data
    root = (data.cache_dir or default_folder()).expanduser()
    fingerprint = group.on_main(lambda: tower_fingerprint(whole_folder(config.model.path)))
    stored = _NARROW[dtype]
    compute = stored if config.quant.tower == "none" else f"{stored} {config.quant.tower}"
    variant = make_variant(
        fingerprint, model_config, compute, stored if data.cache_dtype == "auto" else data.cache_dtype
    )
    cache = FeatureCache(root, variant, images, group, exif=data.exif, bit_depth=data.bit_depth)
    lookup, each = cache.lookup, cache.picture_bytes
    log.info(
        tr(
            "features: {pictures} pictures x {each} = {all} in {root}; {there} there, {to_compute} to compute ({size})",
            pictures=lookup.pictures,
            each=size_text(each),
            all=size_text(lookup.pictures * each),
            root=root,
            there=lookup.pictures - lookup.to_compute,
            to_compute=lookup.to_compute,
            size=size_text(cache.more_bytes),
        )
    )
    return cache


def fill(config: RunConfig, cache: FeatureCache, group: Group, dtype: torch.dtype) -> FillReport:
    """Evict to fit the budget, log an estimate of the time, load the tower, compute, free the tower. Collective."""
    device, data, path = group.device, config.data, config.model.path
    removed = cache.make_room(data.cache_budget)
    if removed:
        log.info(tr("features: {removed}", removed=removed))
    each = seconds_per_picture(load_model_config(path), device, dtype)
    share = -(-cache.lookup.to_compute // group.size)
    log.info(
        tr(
            "features: filling {to_compute} pictures on {size} x {type}, about {time} (an estimate)",
            to_compute=cache.lookup.to_compute,
            size=group.size,
            type=device.type,
            time=format_duration(each * share),
        )
    )
    settings = FillSettings(
        image_size=load_model_config(path).image_size,
        max_pixels=data.max_pixels,
        exif=data.exif,
        bit_depth=data.bit_depth,
        batch=resolve_cache_batch(data.cache_batch, frames=load_model_config(path).numbered_images),
        workers=max(1, resolve_workers(data.workers, group.local_size)),
        skip_bad=data.on_bad == "skip",
    )
    with phase(phrase("filling the feature cache"), config, device):
        return cache.fill(_loader(config, dtype, device, share), settings, device, str(path), log.info)


def _loader(config: RunConfig, dtype: torch.dtype, device: torch.device, pictures: int) -> Callable[[], Tower]:
    """Return a function that loads the tower, compiled as ``train.compile`` says; ``auto`` needs enough pictures."""
    able = can_compile(device) and pictures >= _WORTH_COMPILING
    compiles = resolve_compile(config.train.compile, "single", able=able)

    def load() -> Tower:
        if compiles:
            prepare_compiling(device)
        placement = filling_placement(config, load_model_config(config.model.path), device)
        vision = load_tower(
            config.model.path,
            dtype=dtype,
            device=device,
            quantization=QuantSection(tower=config.quant.tower),
            placement=placement,
        )
        if placement is not None:
            log.info(tr("features: {streamed}", streamed=placement.describe()))
        if compiles:
            compile_tower(vision)
        return vision.features

    return load


def _choose(config: RunConfig, cache: FeatureCache, demand: Demand) -> CacheChoice:
    asked: Any = config.data.cache_features
    budget = config.data.cache_budget
    return choose(asked, demand, cache.space(budget), budget, cache.problem)


def _demand(config: RunConfig, inputs: Inputs, feed: Feed, progress: Progress, total: int) -> tuple[int, set[ImageRef]]:
    """Return how often the tower would run until the end of the run, and on which images, validation included."""
    steps = max(0, total - progress.step)
    counts = feed.shown(progress.position, steps)
    showings, images = 0, set[ImageRef]()
    for shown, count in zip(inputs.rows.images, counts.tolist(), strict=True):
        if count:
            showings += count * len(shown)
            images.update(shown)
    if steps:
        validations = -(-steps // (config.eval.steps or config.train.save_steps))
        for shown in (images for held in inputs.validation.values() for images in held.images):
            showings += validations * len(shown)
            images.update(shown)
    return showings, images


def _say_live(reason: str) -> None:
    log.info(tr("features: the tower runs in every step: {reason}", reason=reason))
