"""The full-size model on the meta device with an adapter, and one training step through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from cogtune import CogVLM2Config, CogVLM2ForCausalLM
from cogtune.adapters.attach import attach
from cogtune.configuration.run import LoraSection
from cogtune.model.checkpointing import enable_checkpointing, first_layers
from cogtune.model.compile import compile_layers
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
    model, base, config = _model(setting, targets)
    if setting.decoder or setting.blocks:
        layers, blocks = len(base.model.layers), setting.sizes.vision.num_hidden_layers
        enable_checkpointing(
            base, first_layers(len(setting.decoder), layers), first_layers(len(setting.blocks), blocks)
        )
    inputs = _inputs(setting, config)
    mode = LiveBytes()
    mode.ignore(iter([*model.parameters(), *model.buffers(), *_tensors(inputs)]))
    with gpu_operators(), mode:
        loss = model(**inputs, num_items_in_batch=setting.batch.labelled).loss
        held = mode.live
        loss.backward()
    return Step(held, mode.peak)


def meta_answer(setting: Setting) -> tuple[int, int]:
    """The most that the tower holds over a picture, and that the first pass over a prompt holds with its cache, beyond
    weights and inputs. The last tokens' logits are all that is computed."""
    model, base, config = _model(setting, ["experts"])
    model.eval()
    inputs = _inputs(setting, config)
    types = torch.tensor([[0] + [1] * config.num_image_tokens + [0] * (setting.batch.text - 1)] * setting.batch.rows)
    inputs["routing"] = Routing.build(types, keep_columns=True).keep_last(1).to("meta")
    pixels, _ = inputs.pop("pixel_values"), inputs.pop("labels")
    known = [*model.parameters(), *model.buffers(), *_tensors(inputs), pixels]
    tower, first = LiveBytes(), LiveBytes()
    with torch.no_grad(), gpu_operators():
        tower.ignore(iter(known))
        with tower:
            features = base.model.encode_images(pixels)
        first.ignore(iter([*known, features]))
        with first:
            cache = DynamicCache(config=config)
            hidden = base.model(inputs["input_ids"], inputs["routing"], features, cache)
            logits = base.lm_head(hidden).float()
    assert logits.shape[0] == setting.batch.rows
    return tower.peak, first.peak


def _model(setting: Setting, targets: list[str]) -> tuple[Any, CogVLM2ForCausalLM, CogVLM2Config]:
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
        return attach(base, lora).train(), base, config


def _inputs(setting: Setting, config: CogVLM2Config) -> dict[str, Any]:
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
    return inputs


def _tensors(inputs: dict[str, Any]) -> list[torch.Tensor]:
    routing = inputs["routing"]
    found = [value for value in vars(routing).values() if isinstance(value, torch.Tensor)]
    return found + [value for value in inputs.values() if isinstance(value, torch.Tensor)]


def compiled_layers(setting: Setting, targets: list[str]) -> list[int]:
    """Bytes each decoder layer keeps when it is compiled, by the tensors that its graph saves for the backward pass.

    The graphs are cut into forward and backward as on a GPU; their operations then run one by one.
    """
    model, base, config = _model(setting, targets)
    compile_layers(base, "aot_eager_decomp_partition")
    inputs = _inputs(setting, config)
    ignored = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *_tensors(inputs)]}
    kept: dict[int, torch.Tensor] = {}
    sizes = [0] * len(base.model.layers)
    running = [0]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored and storage._cdata not in kept:
            kept[storage._cdata] = tensor  # held, so that no other storage takes its place
            sizes[running[0]] += storage.nbytes()
        return tensor

    for index, layer in enumerate(base.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: running.__setitem__(0, index))
    with gpu_operators(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = base.model.forward(inputs["input_ids"], inputs["routing"], inputs["image_features"])
    assert hidden.requires_grad
    return sizes
