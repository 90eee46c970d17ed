"""The base model a measurement runs on: a checkpoint folder through the ordinary loading, or random weights."""

from __future__ import annotations

import torch

from cogtune.checkpoint.load import load_config
from cogtune.checkpoint.place import finish_units
from cogtune.checkpoint.random import tiny_config
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.run import RunConfig
from cogtune.errors import ConfigError
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.rope import inverse_frequencies
from cogtune.train.engines.base import Engine
from cogtune.train.run import load_base

RANDOM = ("random", "random-tiny")
"""Names that stand in ``model.path`` for weights made on the device: of the published sizes, or of a test's."""


def model_config(path: str) -> CogVLM2Config:
    """The sizes of a checkpoint folder or of random weights."""
    if path == "random":
        return CogVLM2Config(eos_token_id=[128001, 128009])
    return tiny_config() if path == "random-tiny" else load_config(path)


def build_base(config: RunConfig, engine: Engine, dtype: torch.dtype, *, cached: bool) -> CogVLM2ForCausalLM:
    """The frozen base, ``cached``: without its tower. Random weights are not read from a disk, and quantising belongs
    to reading.

    Raises:
        ConfigError: quantised random weights; a checkpoint folder has to be named for them.
    """
    if config.model.path not in RANDOM:
        return load_base(config, engine, dtype, cached=cached)
    quant = getattr(config, "quant", None)
    if quant is not None and quant != type(quant)():
        raise ConfigError(
            "quant: random weights are made in bfloat16; quantisation happens while a checkpoint loads",
            hint="write one with `cogtune bench make-checkpoint DIR` and pass --model DIR",
        )
    model = random_weights(model_config(config.model.path), dtype, engine.device, tower=not cached)
    if engine.placement is not None:
        finish_units(model, engine.placement)
    return model.eval()


def random_weights(
    config: CogVLM2Config, dtype: torch.dtype, device: torch.device, *, tower: bool = True, seed: int = 0
) -> CogVLM2ForCausalLM:
    """A model filled on ``device`` itself: normal weights, small enough that 32 layers stay finite."""
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    if not tower:
        model.model.vision.drop_tower()
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    rotary = inverse_frequencies(config.head_dim, float(config.rope_theta), device)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("inv_freq"):
                tensor.copy_(rotary)
            elif "norm" in name and name.endswith("weight"):
                tensor.fill_(1.0)
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                tensor.normal_(std=0.02, generator=generator)
    model.remember_rotary()
    return model
