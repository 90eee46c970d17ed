"""The full-size model with random weights, made unit by unit on the device as a streaming loader would deliver them.

Its samples: S400 is one picture (2,306 positions) whose tower output is given, 400 text tokens, 200 of them labelled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TEXT, LABELLED = 400, 200


def build(config: Any, small: bool) -> nn.Module:
    """The model on the meta device, without the tower that cached features replace."""
    from cogtune import CogVLM2Config, CogVLM2ForCausalLM
    from cogtune.checkpoint.random import tiny_config

    shapes = tiny_config() if small else CogVLM2Config(eos_token_id=[128001, 128009])
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(shapes)
    model.model.vision.transformer.layers = nn.ModuleList()
    model.model.vision.patch_embedding = nn.Module()
    return model.to(torch.bfloat16)


def fill(model: Any, device: torch.device, placement: Any, quantisation: str) -> None:
    """Random weights, a unit at a time: made on the device, quantised, sharded."""
    generator = torch.Generator(device).manual_seed(0)
    kinds = ("DecoderLayer", "GLUAdapter")
    units = [
        (n, m) for n, m in model.named_modules() if type(m).__name__ in kinds or n.endswith(("embed_tokens", "lm_head"))
    ]
    for name, unit in [*units, ("", model)]:
        for path, module in unit.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, tensor in own:
                if tensor.is_meta:
                    _put(module, key, _values(f"{path}.{key}", tensor, device, generator))
        if quantisation == "nf4" and type(unit).__name__ == "DecoderLayer":
            _to_nf4(unit, device)
        if placement is not None and name:
            placement.finish(name, unit)
    model.model.remember_rotary()


def _put(module: nn.Module, key: str, value: torch.Tensor) -> None:
    if key in dict(module.named_parameters(recurse=False)):
        setattr(module, key, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(key, value)


def _values(name: str, tensor: torch.Tensor, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if name.endswith("inv_freq"):
        width = 2 * tensor.shape[0]
        return value.copy_(500000.0 ** (-torch.arange(0, width, 2, device=device) / width))
    if "norm" in name:
        return value.fill_(1.0) if name.endswith("weight") else value.zero_()
    return value.normal_(std=0.02, generator=generator)


def _to_nf4(unit: nn.Module, device: torch.device) -> None:
    import bitsandbytes as bnb

    for name, layer in list(unit.named_modules()):
        if isinstance(layer, nn.Linear):
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.bfloat16,
                quant_type="nf4", quant_storage=torch.bfloat16, device="meta",
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", quant_storage=torch.bfloat16, module=new
            )
            new.bias = layer.bias
            new.to(device)
            if not new.weight.bnb_quantized:
                new.weight = new.weight.to(device)
            unit.set_submodule(name, new)


def sample(config: Any, batch: int, device: torch.device, seed: int) -> dict[str, Any]:
    """``batch`` rows of S400 with features in place of pixels."""
    from cogtune.model.routing import Routing

    generator = torch.Generator().manual_seed(seed)
    image = config.num_image_tokens
    text = torch.randint(0, min(config.vocab_size, 128000) - 10, (batch, TEXT), generator=generator)
    start = torch.full((batch, 1), 1)
    ids = torch.cat([start, torch.full((batch, image), 2), text], 1)
    types = torch.zeros_like(ids)
    types[:, 1 : 1 + image] = 1
    labels = torch.full_like(ids, -100)
    labels[:, -LABELLED:] = ids[:, -LABELLED:]
    features = torch.randn(batch, config.grid**2, config.vision_config.hidden_size, generator=generator)
    return {
        "input_ids": ids.to(device),
        "token_type_ids": types.to(device),
        "labels": labels.to(device),
        "routing": Routing.build(types, labels=labels).to(device),
        "image_features": features.to(device, torch.bfloat16),
    }
