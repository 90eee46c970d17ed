"""The full-size model on the meta device with an adapter, and one training step through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cogtune import CogVLM2Config, CogVLM2ForCausalLM
from cogtune.adapters.attach import attach
from cogtune.configuration.run import LoraSection
from cogtune.model.checkpointing import enable_checkpointing, first_layers
from cogtune.model.routing import Routing
from cogtune.plan.setting import Setting
from tests.support.meta_memory import LiveBytes, gpu_operators


@dataclass(frozen=True)
class Step:
    """Bytes beyond weights and inputs: when the forward pass is through, and the most there ever was."""

    held: int
    peak: int


def meta_step(setting: Setting, targets: list[str]) -> Step:
    """Run the real code under ``setting`` (its batch, adapter and recomputed layers)."""
    sizes = setting.sizes
    own = {key: getattr(sizes, key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")}
    config = CogVLM2Config(
        **own,
        num_attention_heads=sizes.num_attention_heads,
        num_multi_query_heads=sizes.num_multi_query_heads,
        vision_config=vars(sizes.vision),
    )
    with torch.device("meta"):
        base = CogVLM2ForCausalLM(config).to(getattr(torch, setting.dtype))
        base.model.rotary_frequencies = torch.empty(config.head_dim // 2, dtype=torch.bfloat16)
        lora = LoraSection(targets=targets, rank=setting.adapter.rank, dropout=setting.adapter.dropout)
        model = attach(base, lora).train()
    if setting.decoder or setting.blocks:
        layers, blocks = len(base.model.layers), sizes.vision.num_hidden_layers
        enable_checkpointing(
            base, first_layers(len(setting.decoder), layers), first_layers(len(setting.blocks), blocks)
        )
    return _step(model, setting, config)


def _step(model: Any, setting: Setting, config: CogVLM2Config) -> Step:
    batch, image = setting.batch, config.num_image_tokens * int(setting.batch.images)
    types = torch.tensor([[0] + [1] * image + [0] * (batch.text - 1)] * batch.rows)
    labels = torch.full_like(types, -100)
    labels[:, -batch.labelled :] = 7
    inputs: dict[str, Any] = {"input_ids": torch.zeros_like(types).to("meta"), "labels": labels.to("meta")}
    inputs["routing"] = Routing.build(types, labels=labels).to("meta")
    pictures, vision = int(batch.rows * batch.images), setting.sizes.vision
    dtype = getattr(torch, setting.dtype)
    if pictures and setting.tower == "cached":
        shape = (pictures, config.grid**2, vision.hidden_size)
        inputs["image_features"] = torch.empty(shape, device="meta", dtype=dtype)
    elif pictures:
        side = vision.image_size
        inputs["pixel_values"] = torch.empty((pictures, 3, side, side), device="meta", dtype=torch.float32)
    mode = LiveBytes()
    mode.ignore(iter([*model.parameters(), *model.buffers(), *_tensors(inputs)]))
    with gpu_operators(), mode:
        loss = model(**inputs, num_items_in_batch=batch.labelled).loss
        held = mode.live
        loss.backward()
    return Step(held, mode.peak)


def _tensors(inputs: dict[str, Any]) -> list[torch.Tensor]:
    routing = inputs["routing"]
    found = [value for value in vars(routing).values() if isinstance(value, torch.Tensor)]
    return found + [value for value in inputs.values() if isinstance(value, torch.Tensor)]
