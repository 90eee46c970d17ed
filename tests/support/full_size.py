"""The full-size model on the meta device with an adapter, and one training step through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from cogtune import CogVLM2Config, CogVLM2ForCausalLM
from cogtune.adapters.attach import attach
from cogtune.adapters.tensor_parallel import split_adapter
from cogtune.configuration.run_config import LoraSection
from cogtune.distributed.group import TensorGroup
from cogtune.model.activation_checkpointing import enable_checkpointing, first_layers
from cogtune.model.compile import compile_layers, prepare_compiling
from cogtune.model.routing import Routing
from cogtune.model.tensor_parallel import SplitModel
from cogtune.plan.setting import Setting
from tests.support.meta_memory import LiveBytes, gpu_operators


@dataclass(frozen=True)
class Step:
    """Bytes beyond weights and inputs: when the forward pass is through, and the most there ever was."""

    held: int
    peak: int


def meta_step(setting: Setting, targets: list[str]) -> Step:
    """Run the real code under ``setting``: its batch, adapter and recomputed layers, ZeRO-3's linear maps, and what one
    of ``setting.tensor`` ranks computes."""
    model, base, config = _model(setting, targets)
    if setting.decoder or setting.blocks:
        layers, blocks = len(base.model.layers), setting.sizes.vision.num_hidden_layers
        enable_checkpointing(
            base, first_layers(len(setting.decoder), layers), first_layers(len(setting.blocks), blocks)
        )
    inputs = _inputs(setting, config)
    mode = LiveBytes()
    mode.ignore(iter([*model.parameters(), *model.buffers(), *_tensors(inputs)]))
    with gpu_operators(), _linear_maps(setting), mode:
        loss = model(**inputs, num_items_in_batch=setting.batch.labelled).loss
        held = mode.live
        loss.backward()
    return Step(held, mode.peak)


@contextmanager
def _linear_maps(setting: Setting) -> Iterator[None]:
    """DeepSpeed's own in the place of torch's, as its ``zero.Init`` leaves them."""
    if setting.engine != "zero3":
        yield
        return
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    plain = functional.linear
    functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = plain


class _Unmet(TensorGroup):
    """The first of the ranks, with nothing from the others."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().clone()

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]


# Operators that launch nothing: other views of a tensor, and memory without a value.
_SILENT = """view _unsafe_view t transpose expand slice split split_with_sizes detach unsqueeze squeeze permute alias
select as_strided unbind _reshape_alias empty empty_like empty_strided new_empty"""


class _Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found, self._silent = Counter[str](), _SILENT.split()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.found[name] += name not in self._silent
        return func(*args, **(kwargs or {}))


def kernels(setting: Setting, targets: list[str]) -> int:
    """How many operators a step runs uncompiled that would each launch a kernel."""
    model, base, config = _model(setting, targets)
    if setting.decoder:
        enable_checkpointing(base, sorted(setting.decoder), ())
    inputs, mode = _inputs(setting, config), _Kernels()
    with gpu_operators(), mode:
        model(**inputs, num_items_in_batch=setting.batch.labelled).loss.backward()
    return mode.found.total()


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
        if setting.tensor == 1:
            return attach(base, lora).train(), base, config
        split = SplitModel(_Unmet(0, setting.tensor), torch.device("meta"))
        split.prepare(base)
        model = attach(base, lora, building=split.whole_sizes(base))
        split_adapter(model, split)
        return model.train(), base, config


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
    prepare_compiling(torch.device("cpu"))
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
