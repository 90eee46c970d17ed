"""Outputs and gradients of quantised linear layers against bfloat16 and float32, layer by layer.

    python -m benchmarks.parity benchmarks/results/parity.json [--device cuda] [--parts tiny,full-width]

``tiny`` is the demo's base with a batch of the demo's own rows; ``full-width`` one decoder layer and one tower layer of
the published widths with normal weights (no outliers, as published weights have them) and random tokens. An adapter of
rank 16 with a second matrix that is not zero sits on all linear layers of the experts. Each linear layer is compared
``alone`` (input and arriving gradient are the float32 model's) and ``whole`` (everything before and behind it is in
that number format too). An error is the norm of the difference over the norm of what it is compared with. On a CPU
bfloat16 products are taken in float32 and rounded, as a GPU's tensor cores do it: the CPU's own are far too slow.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from cogtune.adapters.attach import attach
from cogtune.bench.report import Results, shown_command
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import random_weights
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.configuration.run_config import LoraSection
from cogtune.data.collate import collate
from cogtune.data.dataset import RowSample
from cogtune.demo import easyvqa
from cogtune.demo.base import BASE
from cogtune.demo.record import use_all_cores
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.quantized.fp8 import Fp8Linear
from cogtune.processing.image import preprocess, read_image
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.tree import build_tree

FORMS = {
    "float32": (torch.float32, PLAIN),
    "bfloat16": (torch.bfloat16, PLAIN),
    "fp8": (torch.bfloat16, QuantSection(experts="fp8", tower="fp8")),
    "int8": (torch.bfloat16, QuantSection(experts="int8", tower="int8")),
    "nf4": (torch.bfloat16, QuantSection(experts="nf4", tower="nf4")),
}
"""Number format of the computation, and what is quantised. The first two are what the others are compared with."""
RANK, SECOND = 16, 0.02  # of the adapter; standard deviation of its second matrix
ROWS = 16
_OUTPUT, _INPUT_GRADIENT, _ARRIVING = "output", "input gradient", "arriving gradient"
_LINEAR = re.compile(r"model\.(?:vision\.transformer\.)?layers\.(\d+)\.(.+)")

Make = Callable[[torch.dtype, QuantSection], CogVLM2ForCausalLM]


@dataclass
class Pass:
    """What one forward and backward pass left: a tensor of each kind by linear layer."""

    loss: float = 0.0
    found: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    linears: dict[str, nn.Module] = field(default_factory=dict)


class RoundedLinear(nn.Linear):
    """A bfloat16 layer whose products are summed in float32, in both directions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def run(model: CogVLM2ForCausalLM, batch: Mapping[str, Any]) -> Pass:
    """One pass over a batch with a fixed adapter; every linear layer of decoder layers and tower is seen."""
    if model.device.type == "cpu":
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = RoundedLinear
    torch.manual_seed(0)
    adapted = attach(model, LoraSection(targets=("experts",), rank=RANK, alpha=2.0 * RANK))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SECOND)
    model.model.embed_tokens.register_forward_hook(lambda _module, _given, out: out.requires_grad_())
    seen, watched = Pass(), list[RemovableHandle]()
    for path, module in model.named_modules():
        place = _LINEAR.fullmatch(path.removesuffix(".base_layer"))
        if isinstance(module, nn.Linear) and place and "lora_" not in path:
            watched += _watch(module, path.removesuffix(".base_layer"), seen)
    loss = adapted(**batch).loss
    loss.backward()
    seen.loss = float(loss.detach())
    for handle in watched:  # the layers are called again, alone
        handle.remove()
    for name, parameter in adapted.named_parameters():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.default\.weight", name)
        if found and parameter.grad is not None:
            seen.found[found[1]][f"LoRA {found[2]} gradient"] = parameter.grad.detach()
    return seen


def _watch(module: nn.Module, path: str, seen: Pass) -> list[RemovableHandle]:
    kept = seen.found.setdefault(path, {})
    seen.linears[path] = module
    if isinstance(module, Fp8Linear):  # asked as a layer, to be seen; its input is then rounded to bfloat16 once more
        module.of_gelu = lambda x: module(functional.gelu(x))  # type: ignore[method-assign]

    def forward(_module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.inputs[path], kept[_OUTPUT] = given[0].detach(), out.detach()

    def backward(_module: nn.Module, given: tuple[Any, ...], out: tuple[Any, ...]) -> None:
        if given[0] is not None:
            kept[_INPUT_GRADIENT], kept[_ARRIVING] = given[0].detach(), out[0].detach()

    return [module.register_forward_hook(forward), module.register_full_backward_hook(backward)]


def alone(module: nn.Module, x: torch.Tensor, arriving: torch.Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """Output and input gradient of one layer for a given input and arriving gradient."""
    x = x.to(dtype).requires_grad_(arriving is not None)
    out = module(x)
    if arriving is None:
        return {_OUTPUT: out.detach()}
    (gradient,) = torch.autograd.grad(out, x, arriving.to(dtype))
    return {_OUTPUT: out.detach(), _INPUT_GRADIENT: gradient}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _errors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    kinds = [kind for kind in found if kind in wanted and kind != _ARRIVING and wanted[kind].numel()]
    return {kind: error(found[kind], wanted[kind]) for kind in kinds}


def compare(make: Make, batch: Mapping[str, Any], forms: Iterable[str]) -> list[dict[str, Any]]:
    """A row for each number format: losses, and the errors of every linear layer."""
    passes, singles, rows = dict[str, Pass](), dict[str, dict[str, dict[str, Any]]](), list[dict[str, Any]]()
    for form in FORMS:
        if form not in (*forms, "float32", "bfloat16"):
            continue
        dtype, quantization = FORMS[form]
        ours = run(make(dtype, quantization), _cast(batch, dtype))
        reference = passes.setdefault("float32", ours)
        given = {path: (reference.inputs[path], reference.found[path].get(_ARRIVING)) for path in ours.linears}
        singles[form] = {path: alone(module, *given[path], dtype) for path, module in ours.linears.items()}
        ours.linears.clear()  # the model goes, what it computed stays
        passes[form] = ours
        row: dict[str, Any] = {"form": form, "loss": ours.loss, "against": {}}
        for other in [name for name in ("bfloat16", "float32") if name in passes and name != form]:
            row["against"][other] = {
                "loss": abs(ours.loss / passes[other].loss - 1),
                "linears": {
                    path: {
                        "alone": _errors(singles[form][path], singles[other][path]),
                        "whole": _errors(ours.found[path], passes[other].found[path]),
                    }
                    for path in ours.found
                },
                "layers": _layers(ours.found, passes[other].found),
            }
        rows.append(row)
        if form not in ("float32", "bfloat16"):
            del passes[form], singles[form]
    return rows


def _layers(found: dict[str, dict[str, torch.Tensor]], wanted: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Errors of all gradients of a layer's adapters together, and of the worst output in it."""
    layers: dict[str, Any] = {}
    for path in found:
        layers.setdefault(path[: _LINEAR.fullmatch(path).end(1)], []).append(path)  # type: ignore[union-attr]
    return {layer: _layer(paths, found, wanted) for layer, paths in layers.items()}


def _layer(paths: list[str], found: Any, wanted: Any) -> dict[str, float]:
    linears = [_errors(found[path], wanted[path]) for path in paths]
    errors = {
        f"worst {kind}": max(linear[kind] for linear in linears if kind in linear)
        for kind in (_OUTPUT, _INPUT_GRADIENT)
        if any(kind in linear for linear in linears)
    }
    places = [(path, kind) for path in paths for kind in wanted[path] if kind.startswith("LoRA")]
    if places:
        ours, theirs = (torch.cat([side[path][kind].flatten() for path, kind in places]) for side in (found, wanted))
        errors["LoRA gradients"] = error(ours, theirs)
    return errors


def _cast(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def tiny_batch(device: torch.device) -> dict[str, Any]:
    """The first pictures of easy-VQA with their questions, as the demo trains them."""
    encoder = CogVLM2Processor.from_pretrained(BASE).encoder
    side = load_model(BASE).config.image_size
    rows = [
        RowSample(
            build_tree([encoder.encode(question, answer=answer) for question, answer in picture.questions]),
            (preprocess(read_image(picture.file), side),),
            (),
        )
        for picture in easyvqa.read_split(easyvqa.find_easy_vqa(), "train", ROWS)
    ]
    batch = collate(rows)
    del batch["record_ids"], batch["num_labels"]
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def full_width_config() -> CogVLM2Config:
    """The published widths with one tower layer, two decoder layers (the last computes less) and a smaller picture."""
    vision = {"image_size": 224, "num_hidden_layers": 1, "num_positions": 257}
    return CogVLM2Config(
        vocab_size=1024, num_hidden_layers=2, bos_token_id=1000, eos_token_id=[1001, 1009], pad_token_id=1002,
        vision_config=vision,
    )  # fmt: skip


def full_width_batch(config: CogVLM2Config, device: torch.device, text: int) -> dict[str, Any]:
    """A random picture and ``text`` random tokens behind it, all labelled."""
    generator = torch.Generator().manual_seed(2)
    image = config.num_image_tokens
    ids = torch.randint(0, 1000, (1, 1 + image + text), generator=generator)
    types, labels = torch.zeros_like(ids), ids.clone()
    ids[0, 0], ids[0, 1 : 1 + image], types[0, 1 : 1 + image] = 1000, 1002, 1
    labels[0, : 1 + image] = -100
    side = config.image_size
    pixels = torch.randn(1, 3, side, side, generator=generator)
    given = {"input_ids": ids, "token_type_ids": types, "labels": labels, "pixel_values": pixels}
    return {name: value.to(device) for name, value in given.items()}


def _tiny(device: torch.device, dtype: torch.dtype, quantization: QuantSection) -> CogVLM2ForCausalLM:
    return load_model(BASE, dtype=dtype, device=device, quantization=quantization).train()


def _full_width(device: torch.device, dtype: torch.dtype, quantization: QuantSection) -> CogVLM2ForCausalLM:
    model = random_weights(full_width_config(), torch.bfloat16, device, quantization=quantization)
    return (model.float() if dtype == torch.float32 else model).train()


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", default="tiny,full-width")
    parser.add_argument("--forms", default=",".join(list(FORMS)[2:]), help="besides bfloat16 and float32")
    parser.add_argument("--text", type=int, default=128, help="text tokens of the full-width part")
    given = parser.parse_args()
    use_all_cores()
    device, typed = torch.device(given.device), ["python", "-m", "benchmarks.parity", *sys.argv[1:]]
    results = Results("parity", shown_command(typed), given.target)
    parts = {
        "tiny": (_tiny, lambda: tiny_batch(device)),
        "full-width": (_full_width, lambda: full_width_batch(full_width_config(), device, given.text)),
    }
    for part in given.parts.split(","):
        make, batch = parts[part]
        for row in compare(partial(make, device), batch(), given.forms.split(",")):
            results.add({"name": f"{part} {row['form']}", "part": part, "device": device.type, **row})
            print(f"{part} {row['form']}: loss {row['loss']:.5f}")
            for other, errors in row["against"].items():
                print(f"  against {other}: loss {errors['loss']:.2e}")
                for layer, values in errors["layers"].items():
                    print(f"    {layer}: " + ", ".join(f"{kind} {value:.2e}" for kind, value in values.items()))


if __name__ == "__main__":
    main()
