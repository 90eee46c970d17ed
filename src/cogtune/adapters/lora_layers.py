"""How an adapted layer computes: ``base(x) + (x A') (s B)'`` with float32 A and B, in the model's number format.

peft's own forward multiplies the whole update by its scale and casts what it needs; here the scale is taken into the
small matrix, so neither pass reads and writes an activation for it, and all that is kept for the backward pass is x
(once for all adapters that share it) and x A'. The base layer is called as a module, whatever it is: quantised, sharded
or plain. Everything else about the layer stays peft's: its files, merging, switching adapters off.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from cogtune.model.casting import converted
from cogtune.model.fork import fork


class ComputeCastLinear(nn.Linear):
    """A linear layer that keeps its weight in float32 and computes in its input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)


class AddedLinear(ComputeCastLinear):
    """The second matrix of an update: given ``onto``, adds ``scale`` times its result to that."""

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        if onto is None:
            return super().forward(x)
        weight = self.scaled(scale, x.dtype)
        if torch.compiler.is_compiling():
            added: torch.Tensor = _Sum.apply(onto, functional.linear(x, weight))
            return added
        return torch.addmm(onto, x, weight.t()) if x.dim() == 2 else onto + functional.linear(x, weight)

    def scaled(self, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """The weight times ``scale``, in ``dtype``."""
        return (self.weight * scale).to(dtype)


class _Sum(torch.autograd.Function):
    """A sum to be computed in whatever kernel reads it. Of a plain sum with a product torch's compiler makes one
    library call that begins with a copy of the other summand; of the casts that prevent it, copies of the gradient."""

    @staticmethod
    def forward(ctx: Any, onto: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return converted(onto.float() + update.float(), onto.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient


class _Fast:
    """What is mixed into a peft layer class: its forward, and the parts of it for whoever computes several layers
    together (`model.swiglu.Updated`)."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's, which also computes whatever this does not know."""
        name = fast_adapter(self)
        if name is None or args or kwargs:
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        x_base, x_update = fork(x, 2)
        onto = self.base_layer(x_base)
        small = self.small(x_update.to(onto.dtype))
        added: torch.Tensor = self.lora_B[name](small, onto=onto, scale=self.scaling[name])
        return added

    def update_rank(self: Any) -> int | None:
        name = fast_adapter(self)
        if name is None or 0 in (self.lora_A[name].weight.numel(), self.lora_B[name].weight.numel()):
            return None  # not here before the layer is called as a module: ZeRO-3 divides what is not small
        return int(self.lora_A[name].out_features)

    def drops_inputs(self: Any) -> bool:
        dropout = self.lora_dropout[self.active_adapters[0]]
        return bool(self.training and getattr(dropout, "p", 0.0) > 0)

    def base(self: Any, x: torch.Tensor) -> torch.Tensor:
        onto: torch.Tensor = self.base_layer(x)
        return onto

    def small(self: Any, x: torch.Tensor) -> torch.Tensor:
        name = self.active_adapters[0]
        found: torch.Tensor = self.lora_A[name](self.lora_dropout[name](x))
        return found

    def first_matrix(self: Any, dtype: torch.dtype) -> torch.Tensor:
        weight: torch.Tensor = self.lora_A[self.active_adapters[0]].weight.to(dtype)
        return weight

    def second_matrix(self: Any, dtype: torch.dtype) -> torch.Tensor:
        name = self.active_adapters[0]
        weight: torch.Tensor = self.lora_B[name].scaled(self.scaling[name], dtype)
        return weight

    def finish(self: Any, x: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        name = self.active_adapters[0]
        added: torch.Tensor = self.lora_B[name](small, onto=self.base_layer(x), scale=self.scaling[name])
        return added


_classes: dict[Any, Any] = {}


def _fast_class(kind: Any) -> Any:
    if kind not in _classes:
        _classes[kind] = type(f"Fast{kind.__name__}", (_Fast, kind), {"__module__": __name__})
    return _classes[kind]


def fast_adapter(layer: Any) -> str | None:
    """The adapter a layer computes as this module does it; None where peft's own forward has to: no adapter or several,
    merged, switched off, DoRA and other variants, an update with a bias."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    known = name in layer.lora_A and name not in layer.lora_variant
    plain = known and isinstance(layer.lora_B[name], AddedLinear) and layer.lora_B[name].bias is None
    return name if plain else None


def make_fast(layer: LoraLayer) -> None:
    """Replace an adapted linear layer's two small layers and its forward; called once, right after peft made it."""
    layer.cast_input_dtype_enabled = False
    for pair, kind in ((layer.lora_A, ComputeCastLinear), (layer.lora_B, AddedLinear)):
        for name, linear in pair.items():
            if type(linear) is nn.Linear:
                pair[name] = _with_masters(linear, kind)
    layer.__class__ = _fast_class(type(layer))


def _with_masters(linear: nn.Linear, kind: type[ComputeCastLinear]) -> ComputeCastLinear:
    replacement = kind(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    replacement.weight = nn.Parameter(linear.weight.data.float(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        replacement.bias = nn.Parameter(linear.bias.data.float(), requires_grad=linear.bias.requires_grad)
    return replacement
