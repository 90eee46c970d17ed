"""The base model a measurement runs on: a checkpoint folder through the ordinary loading, or random weights."""

from __future__ import annotations

import torch

from cogtune.checkpoint.load import load_config
from cogtune.checkpoint.place import Builder, Cutting, Placement, require_filled
from cogtune.checkpoint.quantize import device_for, mark_for_adapters, require_packages
from cogtune.checkpoint.random import tiny_config
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.configuration.run_config import RunConfig
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
    """The frozen base, quantised and sharded as ``config`` and ``engine`` say; ``cached``: without its tower."""
    if config.model.path not in RANDOM:
        return load_base(config, engine, dtype, cached=cached)
    quantization = config.quant
    require_packages(quantization)
    sizes = model_config(config.model.path)
    sizes.rope_precision = config.model.rope_precision
    return random_weights(
        sizes, dtype, engine.device, tower=not cached, quantization=quantization, placement=engine.placement
    )


def random_weights(
    config: CogVLM2Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tower: bool = True,
    quantization: QuantSection | None = None,
    placement: Placement | None = None,
    seed: int = 0,
) -> CogVLM2ForCausalLM:
    """A model of normal weights, small enough that 32 layers stay finite, made where they will be.

    As when a checkpoint loads, a tensor comes at a time, layers are quantised when they are complete, and units are
    handed to ``placement``: at no time is there more than the result and one layer.
    """
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    if not tower:
        model.model.vision.drop_tower()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    cutting = placement if isinstance(placement, Cutting) else None
    if cutting is not None:
        cutting.prepare(model)
    builder = Builder(model, "", dtype, quantization, placement)
    formats = quantization or PLAIN
    generators: dict[str, torch.Generator] = {}
    for name, shape in shapes.items():
        home = device_for(formats, name, device if placement is None else placement.device_for(name))
        generator = generators.setdefault(home.type, torch.Generator(home).manual_seed(seed))
        value = _random(name, shape, dtype, home, generator, config)
        builder.add(name, value if cutting is None else cutting.read(name, value).contiguous())
    require_filled(model)
    model.model.remember_rotary()
    mark_for_adapters(model)
    made: CogVLM2ForCausalLM = model.eval()
    return made


def _random(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    config: CogVLM2Config,
) -> torch.Tensor:
    if name.endswith("inv_freq"):
        return inverse_frequencies(config.head_dim, float(config.rope_theta), device).to(dtype)
    value = torch.empty(shape, dtype=dtype, device=device)
    if "norm" in name and name.endswith("weight"):
        return value.fill_(1.0)
    return value.zero_() if name.endswith("bias") else value.normal_(std=0.02, generator=generator)
