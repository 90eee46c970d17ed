"""Forward passes of adapted layers: ``base(x) + (x A') (s B)'`` with float32 A and B, computed in the model's dtype.

peft's own forward multiplies the whole update by its scale and casts its inputs. Here the scale is folded into the
small matrix, so neither the forward nor the backward pass reads and writes an activation for it. Only x (once for all
adapters that share it) and x A' are saved for the backward pass. The base layer is called as a module, whether
quantised, sharded or plain. Everything else remains peft's: files, merging, disabling adapters.

``adapters.lora_conversion`` replaces peft's layers with these; those for bitsandbytes layers are in
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
    """The second matrix of an update: given ``onto``, adds ``scale`` times its output to it."""

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) if onto is None else add_product(onto, x, self.scaled(scale, x.dtype))

    def scaled(self, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight times ``scale``, in ``dtype``."""
        return (self.weight * scale).to(dtype)


class AdaptedLayer(LoraLayer):
    """Common base of the layers below, each of which is one of peft's with another forward pass."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer; peft's own forward handles every case that `plain_adapter` does not recognise."""
        name = plain_adapter(self)
        if name is None or args or kwargs:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        onto = self.base_layer(x)
        small = self.lora_A[name](self.lora_dropout[name](x.to(onto.dtype)))
        added: torch.Tensor = self.lora_B[name](small, onto=onto, scale=self.scaling[name])
        return added

    def low_rank_update(self, dtype: torch.dtype) -> LowRankUpdate | None:
        """Return the parts of the update for `model.swiglu`, which computes three layers together."""
        name = plain_adapter(self)
        if name is None or 0 in (self.lora_A[name].weight.numel(), self.lora_B[name].weight.numel()):
            return None  # partitioned by ZeRO-3, which gathers a weight only when the layer is called as a module
        dropout = self.lora_dropout[name]
        drops = self.training and getattr(dropout, "p", 0.0) > 0
        second = self.lora_B[name].scaled(self.scaling[name], dtype)
        return LowRankUpdate(self.lora_A[name].weight.to(dtype), second, dropout if drops else None)


class LoraLinear(AdaptedLayer, lora.Linear):
    """An adapted linear layer in 16 or 32 bits or in fp8."""


def plain_adapter(layer: Any) -> str | None:
    """Return the adapter that this module can compute for a layer, or None if peft's own forward has to.

    That is the case for no adapter or several, merged or disabled adapters, DoRA and other variants, an update with a
    bias, and layers of other classes.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    known = name in layer.lora_A and name not in layer.lora_variant
    plain = known and isinstance(layer.lora_B[name], AddedLinear) and layer.lora_B[name].bias is None
    return name if plain else None
