"""How an adapted layer computes: ``base(x) + (x A') (s B)'`` with float32 A and B, in the model's number format.

peft's own forward multiplies the whole update by its scale and casts what it needs; here the scale is taken into the
small matrix, so neither pass reads and writes an activation for it, and all that is kept for the backward pass is x
(once for all adapters that share it) and x A'. The base layer is called as a module, whatever it is: quantised, sharded
or plain. Everything else about the layer stays peft's: its files, merging, switching adapters off.

``adapters.lora_conversion`` puts these layers in the place of peft's; those on bitsandbytes' layers are in
``adapters.lora_layers_bnb``.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from cogtune.model.compiler_workarounds import add_product
from cogtune.model.swiglu import LowRankUpdate


class ComputeCastLinear(nn.Linear):
    """A linear layer that keeps its weight in float32 and computes in its input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)


class AddedLinear(ComputeCastLinear):
    """The second matrix of an update: given ``onto``, adds ``scale`` times its result to that."""

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) if onto is None else add_product(onto, x, self.scaled(scale, x.dtype))

    def scaled(self, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """The weight times ``scale``, in ``dtype``."""
        return (self.weight * scale).to(dtype)


class AdaptedLayer(LoraLayer):
    """What the layers below share; each is one of peft's with another forward."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's, which also computes whatever this does not know (see `plain_adapter`)."""
        name = plain_adapter(self)
        if name is None or args or kwargs:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        onto = self.base_layer(x)
        small = self.lora_A[name](self.lora_dropout[name](x.to(onto.dtype)))
        added: torch.Tensor = self.lora_B[name](small, onto=onto, scale=self.scaling[name])
        return added

    def low_rank_update(self, dtype: torch.dtype) -> LowRankUpdate | None:
        """The parts of the update, for `model.swiglu`, which computes three layers together."""
        name = plain_adapter(self)
        if name is None or 0 in (self.lora_A[name].weight.numel(), self.lora_B[name].weight.numel()):
            return None  # not here before the layer is called as a module: ZeRO-3 divides what is not small
        dropout = self.lora_dropout[name]
        drops = self.training and getattr(dropout, "p", 0.0) > 0
        second = self.lora_B[name].scaled(self.scaling[name], dtype)
        return LowRankUpdate(self.lora_A[name].weight.to(dtype), second, dropout if drops else None)


class LoraLinear(AdaptedLayer, lora.Linear):
    """On a linear layer in 16 or 32 bits or in fp8."""


def plain_adapter(layer: Any) -> str | None:
    """The adapter that a layer computes in this module's way; None where peft's own forward has to: no adapter or
    several, merged, switched off, DoRA and other variants, an update with a bias, a layer of another kind."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    known = name in layer.lora_A and name not in layer.lora_variant
    plain = known and isinstance(layer.lora_B[name], AddedLinear) and layer.lora_B[name].bias is None
    return name if plain else None
