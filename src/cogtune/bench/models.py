"""The base model of a measurement: a checkpoint folder through the ordinary loader, or random weights."""

from __future__ import annotations

import torch

from cogtune.checkpoint.model_files import load_model_config
from cogtune.checkpoint.quantize import require_packages
from cogtune.checkpoint.random import (
    published_config,
    published_first_config,
    published_video_config,
    random_weights,
    tiny_config,
    tiny_first_config,
    tiny_video_config,
)
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.run_config import RunConfig
from cogtune.model.layer_streaming import answering_placement
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.train.engines.base import Engine
from cogtune.train.memory_plan import Layers
from cogtune.train.model_setup import load_base

RANDOM = {
    "random": published_config,
    "random-video": published_video_config,
    "random-first": published_first_config,
    "random-tiny": tiny_config,
    "random-tiny-video": tiny_video_config,
    "random-tiny-first": tiny_first_config,
}
"""Values of ``model.path`` for random weights on the device: published sizes, or a test's."""


def model_config(path: str) -> CogVLM2Config:
    """Return the configuration of a checkpoint folder or of random weights."""
    return RANDOM[path]() if path in RANDOM else load_model_config(path)


def build_base(
    config: RunConfig, engine: Engine, dtype: torch.dtype, *, cached: bool, answers: bool = False
) -> CogVLM2ForCausalLM:
    """Build the frozen base, quantised and sharded for ``config`` and ``engine``; ``cached``: without its tower.

    ``answers``: ``quant.stream`` streams what it does in answering.
    """
    quantization, sizes = config.quant, model_config(config.model.path)
    if answers:
        streamed = answering_placement(quantization, sizes, engine.device)
    else:
        streamed = Layers.named(config, sizes).streamed(sizes, engine.device)
    if config.model.path not in RANDOM:
        return load_base(config, engine, dtype, streamed, cached=cached)
    require_packages(quantization)
    if config.model.rope_precision == "float32":  # the other value means: as the configuration says
        sizes.rope_precision = config.model.rope_precision
    placement = streamed or engine.placement
    return random_weights(sizes, dtype, engine.device, tower=not cached, quantization=quantization, placement=placement)
