"""Turns the layers that peft has made for an adapter into this project's, which compute faster and keep less."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn

from cogtune.adapters.lora_layers import AdaptedLayer, AddedLinear, ComputeCastLinear, LoraLinear


def convert_lora_layers(model: nn.Module) -> None:
    """Put this project's layers in the place of those that peft has just made in ``model``.

    Weights become float32; they, all settings and all names stay. Layers of other kinds (embeddings, convolutions) stay
    peft's.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            _take_masters(layer)
            kind = _kind_for(layer)
            if kind is not None:
                converted = kind.__new__(kind)
                converted.__setstate__(vars(layer))  # as a copy is made
                model.set_submodule(path, converted)


def _kind_for(layer: LoraLayer) -> type[AdaptedLayer] | None:
    if type(layer) is lora.Linear:
        return LoraLinear
    if hasattr(lora, "Linear4bit"):  # peft has it where bitsandbytes is installed
        from cogtune.adapters.lora_layers_bnb import LoraLinear4bit, LoraLinear8bit

        return {lora.Linear4bit: LoraLinear4bit, lora.Linear8bitLt: LoraLinear8bit}.get(type(layer))
    return None


def _take_masters(layer: Any) -> None:
    """float32 weights in both small layers, which compute in the format of their input."""
    for pair, small in ((layer.lora_A, ComputeCastLinear), (layer.lora_B, AddedLinear)):
        for name, linear in pair.items():
            if type(linear) is nn.Linear:
                pair[name] = _with_masters(linear, small)


def _with_masters(linear: nn.Linear, kind: type[ComputeCastLinear]) -> ComputeCastLinear:
    replacement = kind(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    replacement.weight = nn.Parameter(linear.weight.data.float(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        replacement.bias = nn.Parameter(linear.bias.data.float(), requires_grad=linear.bias.requires_grad)
    return replacement
