"""Convert peft's LoRA layers to this project's, which are faster and save fewer activations."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn

from cogtune.adapters.lora_layers import AdaptedLayer, AddedLinear, ComputeCastLinear, LoraLinear


def convert_lora_layers(model: nn.Module) -> None:
    """Replace the layers that peft has just created in ``model`` by this project's.

    Weights become float32; their values, all settings and all names stay the same. Other classes (embeddings,
    convolutions) remain peft's.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            _take_masters(layer)
            kind = _kind_for(layer)
            if kind is not None:
                converted = kind.__new__(kind)
                converted.__setstate__(vars(layer))  # takes over all state, like copy.copy
                model.set_submodule(path, converted)


def _kind_for(layer: LoraLayer) -> type[AdaptedLayer] | None:
    if type(layer) is lora.Linear:
        return LoraLinear
    if hasattr(lora, "Linear4bit"):  # peft has it where bitsandbytes is installed
        from cogtune.adapters.lora_layers_bnb import LoraLinear4bit, LoraLinear8bit

        return {lora.Linear4bit: LoraLinear4bit, lora.Linear8bitLt: LoraLinear8bit}.get(type(layer))
    return None


def _take_masters(layer: Any) -> None:
    """Replace both small layers by ones with float32 weights that compute in their input's dtype."""
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
