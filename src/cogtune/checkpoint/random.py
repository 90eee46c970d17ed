"""Random weights for tests, dry runs and measurements: a model in memory, or a folder in the published layout.

`random_model` is for tests: its outputs depend visibly on every input. `random_weights` and `fill_random` are for the
full size: activations stay finite in bfloat16 through 63 tower and 32 decoder layers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from cogtune.checkpoint.place import Builder, Cutting, Placement, require_filled
from cogtune.checkpoint.quantize import device_for, mark_for_adapters
from cogtune.configuration.architectures import FRAMES, PICTURES
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.rope import inverse_frequencies
from cogtune.processing.tokenizer import write_byte_tokenizer

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_multi_query_heads": 2,
    "max_position_embeddings": 8192,
    "vocab_size": 264,
    "bos_token_id": 256,
    "eos_token_id": [257, 259],
    "pad_token_id": 258,
}
TINY_VISION: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_positions": 17,
}
_VIDEO: dict[str, Any] = {"architectures": [FRAMES], "template_version": "base"}
_FIRST: dict[str, Any] = {
    "generation": 1, "rope_theta": 10000.0, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def tiny_config(**changes: Any) -> CogVLM2Config:
    """Return a configuration of about 200,000 parameters; an image takes 6 tokens."""
    vision = TINY_VISION | changes.pop("vision_config", {})
    return CogVLM2Config(**(TINY | changes), vision_config=vision)


def published_config() -> CogVLM2Config:
    """Return the published model's configuration."""
    return CogVLM2Config(eos_token_id=[128001, 128009])


def tiny_video_config(**changes: Any) -> CogVLM2Config:
    """Return the configuration of a tiny video model: one expert, frames of 6 tokens."""
    return tiny_config(**(_VIDEO | {"eos_token_id": 257} | changes))


def published_video_config() -> CogVLM2Config:
    """Return the configuration of the four published video models."""
    vision = {"image_size": 224, "num_positions": 257}
    return CogVLM2Config(**_VIDEO, eos_token_id=128001, max_position_embeddings=2048, vision_config=vision)


def tiny_first_config(**changes: Any) -> CogVLM2Config:
    """Return the configuration of a tiny first-generation model: full heads, an image of 3x3 patches, 11 tokens."""
    vision = {"image_size": 6, "num_positions": 10}
    own = _FIRST | {"num_multi_query_heads": TINY["num_attention_heads"], "vocab_size": 296, "vision_config": vision}
    return tiny_config(**(own | changes))


def published_first_config() -> CogVLM2Config:
    """Return the configuration of the first generation's published models, of 490 pixels."""
    sizes = {"vocab_size": 32000, "intermediate_size": 11008, "num_multi_query_heads": 32}
    return CogVLM2Config(**_FIRST, **sizes, vision_config={"image_size": 490, "num_positions": 1226})


def make_tiny(
    folder: str | Path, seed: int = 0, *, dtype: torch.dtype = torch.bfloat16, shards: int = 3, **changes: Any
) -> Path:
    """Write a tiny random checkpoint with tokenizer into ``folder`` and return it.

    Weights are normal with standard deviation 1/sqrt(fan-in), so that outputs depend visibly on every input.
    """
    target = Path(folder)
    model = random_model(tiny_config(**changes), seed).to(dtype)
    payload = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    model.save_pretrained(target, max_shard_size=math.ceil(payload / shards))
    write_published_config(target, model.config)
    config = model.config
    write_byte_tokenizer(
        target, vocab_size=config.vocab_size, bos=config.bos_token_id, eos=config.eos_token_ids[0],
        eot=config.eos_token_ids[-1], pad=config.pad_token_id,
    )  # fmt: skip
    return target


def random_model(config: CogVLM2Config, seed: int) -> CogVLM2ForCausalLM:
    """Return a float32 model whose weights depend on ``seed`` only."""
    model = CogVLM2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                values = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            else:
                fan_in = math.prod(parameter.shape[1:]) if "embed" not in name and parameter.ndim > 1 else 4
                values = torch.randn(parameter.shape, generator=generator) / math.sqrt(max(fan_in, 1))
            parameter.copy_(values)
    return model.eval()


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
    """Return a model with `fill_random`'s values, generated on their final device.

    As when a checkpoint loads, tensors come one by one, layers are quantised when complete, and units are passed to
    ``placement``. Peak memory is the result plus one layer.
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
    generators: dict[str, torch.Generator] = {}
    for name, shape in shapes.items():
        place = device if placement is None else placement.device_for(name)
        home = device_for(quantization or PLAIN, name, place)
        generator = generators.setdefault(home.type, torch.Generator(home).manual_seed(seed))
        value = fill_random(torch.empty(shape, dtype=dtype, device=home), name, config, generator)
        if cutting is not None:  # copy: a shard may be a view, which would keep the whole tensor alive
            value = cutting.read(name, value).clone(memory_format=torch.contiguous_format)
        builder.add(name, value)
    require_filled(model)
    model.model.remember_rotary()
    mark_for_adapters(model)
    made: CogVLM2ForCausalLM = model.eval()
    return made


def fill_random(value: torch.Tensor, name: str, config: CogVLM2Config, generator: torch.Generator) -> torch.Tensor:
    """Fill ``value``, the tensor ``name`` (in its shape, or flat), in place on the generator's device.

    Norms are neutral and rotary frequencies are correct; everything else is normal with a standard deviation of 0.02.
    """
    if name.endswith("inv_freq"):
        return value.copy_(inverse_frequencies(config.head_dim, float(config.rope_theta)))
    if "norm" in name:
        return value.fill_(1.0) if name.endswith("weight") else value.zero_()
    return value.normal_(std=0.02, generator=generator)


def write_published_config(folder: Path, config: CogVLM2Config) -> None:
    """Write ``config.json`` and ``generation_config.json`` as in the published checkpoint: ``auto_map``, no
    ``model_type``."""
    own = config.to_dict()
    architecture = PICTURES if config.vision_experts else FRAMES
    # the published file omits the number of key/value heads if it is 8, and the first generation has no such key
    omitted = config.vision_experts and (config.generation == 1 or own["num_multi_query_heads"] == 8)
    shapes = [key for key in TINY if key != "num_multi_query_heads" or not omitted]
    keys = [*shapes, "rms_norm_eps", "hidden_act", "initializer_range", "template_version", "use_cache"]
    published = {
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": "configuration_cogvlm.CogVLMConfig",
            "AutoModelForCausalLM": f"modeling_cogvlm.{architecture}",
        },
        "vision_config": {
            key: own["vision_config"][key]
            for key in [*TINY_VISION, "in_channels", "hidden_act", "layer_norm_eps", "dropout_prob"]
        },
    } | {key: own[key] for key in keys}
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_length": 4096,
        "transformers_version": "4.40.2",
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
