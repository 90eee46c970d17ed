"""A model cut over ranks beside the same model on one device. Each case is computed by every rank of a launch and, with
no launch, by one process:

    torchrun --standalone --nproc-per-node 2 -m tests.support.tensor_cases BASE ADAPTER OUTPUT

writes OUTPUT.rank0.pt and OUTPUT.rank1.pt. Layers are compiled by ranks only; one process is what they are held to.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from PIL import Image
from safetensors import safe_open

from cogtune.adapters.attach import attach, load_adapter
from cogtune.adapters.tensor_parallel import AdapterPart, split_adapter
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import shard_files
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.run_config import LoraSection
from cogtune.distributed.group import TensorGroup
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.generate.requests import Request
from cogtune.generate.tensor_parallel import TensorParallelGenerator
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.model.activation_checkpointing import enable_checkpointing
from cogtune.model.compile import compile_layers, prepare_compiling
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.tensor_parallel import SplitModel
from cogtune.processing.processor import CogVLM2Processor

EVERYWHERE = ("experts", "glu-adapter", "vision-tower", "lm_head")


def main(base: Path, adapter: Path, output: Path) -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        group = TensorGroup(dist.get_rank(), dist.get_world_size())
    else:
        group = TensorGroup(0, 1)
    found: dict[str, Any] = {
        "gradients": gradients(base, adapter, group, torch.float64),
        "dropout": gradients(base, adapter, group, torch.float64, recompute=True, dropout=0.4),
        "bfloat16": gradients(base, adapter, group, torch.bfloat16),
        "nf4": gradients(base, adapter, group, torch.float32, quantization=QuantSection(experts="nf4", tower="int8")),
        "answers": answers(base, adapter, group),
        "engine": engine_answers(base, adapter, group),
        "first": first_adapter(base, group),
        "read": read_parts(base, group),
    }
    if group.size > 1:
        found["compiled"] = gradients(base, adapter, group, torch.float64, compiled=True)
    torch.save(found, output.with_suffix(f".rank{group.rank}.pt"))


def load(
    base: Path, group: TensorGroup, dtype: torch.dtype, quantization: QuantSection | None = None
) -> tuple[CogVLM2ForCausalLM, SplitModel]:
    split = SplitModel(group, torch.device("cpu"))
    placement = split if group.size > 1 else None
    model = load_model(base, dtype=dtype, placement=placement, quantization=quantization)
    return model, split


def put_on(model: CogVLM2ForCausalLM, split: SplitModel, adapter: Path, dropout: float) -> tuple[PeftModel, Any]:
    wrapped = load_adapter(model, adapter, trainable=True, building=split.whole_sizes(model))
    for module in wrapped.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif isinstance(module, torch.nn.Identity) and dropout:
            raise AssertionError("the adapter was saved with dropout, so that it has dropout modules")
    return wrapped, split_adapter(wrapped, split) if split.group.size > 1 else {}


def batch(config: Any) -> dict[str, torch.Tensor]:
    """Two rows: one with a picture, one without; labels in both."""
    image, text = config.num_image_tokens, 9
    ids = torch.full((2, 1 + image + text), 5)
    ids[:, -text:] = torch.arange(2 * text).view(2, text) + 20
    ids[0, 1 : 1 + image] = config.pad_token_id
    types = torch.zeros_like(ids)
    types[0, 1 : 1 + image] = 1
    labels = torch.full_like(ids, -100)
    labels[:, -5:] = ids[:, -5:]
    side = config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "token_type_ids": types, "labels": labels, "pixel_values": pixels}


def gradients(
    base: Path,
    adapter: Path,
    group: TensorGroup,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
    compiled: bool = False,
    quantization: QuantSection | None = None,
    dropout: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Loss, and the whole gradient of every adapter weight."""
    model, split = load(base, group, dtype, quantization)
    wrapped, parts = put_on(model, split, adapter, dropout)
    if recompute:
        layers = len(model.model.layers)
        enable_checkpointing(model, range(layers), range(len(model.model.vision.transformer.layers)))
    if compiled:
        prepare_compiling(torch.device("cpu"))
        compile_layers(model, "aot_eager")
        for layer in model.model.vision.transformer.layers:  # its sums are the decoder's, and take as long to trace
            del layer.compute
    wrapped.train()
    torch.manual_seed(11)
    loss = wrapped(**batch(model.config)).loss
    loss.backward()
    named = {name: value.grad for name, value in wrapped.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **{name: whole(parts.get(name), value, group) for name, value in named.items()}}


def whole(part: AdapterPart | None, gradient: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """What the engine makes of ranks' gradients before its step, joined."""
    if part is None:
        return gradient
    if part.cut is not None:
        return part.cut.join(group.gather(gradient))
    return group.sum(gradient) if part.shares else gradient


def answers(base: Path, adapter: Path, group: TensorGroup) -> dict[str, torch.Tensor]:
    """Greedy, sampled and with a static cache; logits of the prompt."""
    model, split = load(base, group, torch.float32)
    wrapped, _ = put_on(model, split, adapter, 0.0)
    wrapped.eval()
    inputs = batch(model.config)
    inputs.pop("labels")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = {"greedy": model.generate(**inputs, **options)}
    found["static"] = model.generate(**inputs, **options, cache_implementation="static")
    torch.manual_seed(5)
    found["sampled"] = model.generate(**inputs, **{**options, "do_sample": True})
    with torch.no_grad():
        found["logits"] = model(**inputs).logits
    return found


def engine_answers(base: Path, adapter: Path, group: TensorGroup) -> dict[str, Any]:
    """Texts through the engine, with fewer slots than questions: new pictures, known ones, drawn, and with a stop text.

    The first rank's, and one device's, which says what ``generate()`` answers too.
    """
    model, split = load(base, group, torch.float32)
    wrapped, _ = put_on(model, split, adapter, 0.0)
    processor = CogVLM2Processor.from_pretrained(base)
    found: dict[str, Any] = {}
    if group.size > 1:
        generator: Generator = TensorParallelGenerator(wrapped.eval(), processor, slots=3)
        if group.rank:
            assert isinstance(generator, TensorParallelGenerator)
            generator.follow()
            return found
    else:
        generator = Generator(wrapped.eval(), processor, slots=3)
    colours = [Image.new("RGB", (40, 30), colour) for colour in ("red", "navy")]
    asks: list[Any] = [(colours[0], "what?"), (None, "who are you"), (colours[1], "and this?"), (colours[0], "why")]
    greedy = Decoding(max_new_tokens=7)
    if group.size == 1:
        oracle = TransformersGenerator(wrapped, processor)
        found["generate"] = [oracle.answer(*ask, decoding=greedy) for ask in asks]
    found["new"] = generator.answer_batch(asks, greedy)
    found["known"] = generator.answer_batch(asks, greedy)
    drawn = Decoding(max_new_tokens=7, sample=True, temperature=1.0, top_p=0.9)
    found["drawn"] = generator.answer_batch(asks, drawn, seeds=[1, 2, 3, 4])
    encoded, images, wanted = generator._asked(asks[0], greedy)
    stop = next(mark for mark in found["new"][0] if mark != found["new"][0][0])
    found["stopped"] = generator.engine.submit(Request(encoded, images, wanted, stop=(stop,))).text()
    generator.close()
    return found


def first_adapter(base: Path, group: TensorGroup) -> dict[str, torch.Tensor]:
    """A fresh adapter, joined again: drawn as one device draws it."""
    model, split = load(base, group, torch.float32)
    torch.manual_seed(7)
    wrapped = attach(model, LoraSection(targets=EVERYWHERE, rank=4), building=split.whole_sizes(model))
    parts = split_adapter(wrapped, split) if group.size > 1 else {}
    joined = {}
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            part = parts.get(name)
            own = value.detach()
            joined[name] = own if part is None or part.cut is None else part.cut.join(group.gather(own))
    return joined


def read_parts(base: Path, group: TensorGroup) -> bool:
    """What is read from the files by slices is what is cut from the loaded model."""
    if group.size == 1:
        return True
    cut, split = load_model(base, dtype=torch.float32), SplitModel(group, torch.device("cpu"))
    split.split(cut)
    values = cut.state_dict()
    for file in shard_files(base):
        with safe_open(str(base / file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not torch.equal(split.read(name, tensors.get_slice(name)).float(), values[name].float()):
                    return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
