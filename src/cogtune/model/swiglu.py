"""down(silu(gate(x)) * up(x)), computed in the way that suits the three layers.

Plain layers are left to the compiler. Three fp8 layers round activations in between (``model.quantized.fp8``). For
three layers with low-rank updates, the updates are fused into the product and its gradient. Otherwise each updated
activation, three times the size of x, would be written to memory once more. With rank 16 adapters on all linear layers
this saves 12 of 180 ms per step (docs/log.md, 2026-11-30).

Shapes: M tokens, D hidden, I inner width, O outputs, R ranks of the updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn
from torch.nn import functional

from cogtune.model.compiler_workarounds import add_product, cast_unless_same
from cogtune.model.kernels import HAS_TRITON, inference_kernel_available, kernel_available
from cogtune.model.quantized.fp8 import Fp8Linear, frozen_gated_mlp

if HAS_TRITON:
    from cogtune.model.kernels import decode, swiglu

_WIDEST_RANK = 64  # the fused kernel keeps an update's blocks on chip with its tile; wider ones run layer by layer


class LowRankUpdate(NamedTuple):
    """``(dropout(x) A') (s B)'``, the term that an adapter adds to a layer's output."""

    first: torch.Tensor
    """A [R, D], in the number format of x."""
    second: torch.Tensor
    """s B [O, R], in the number format of x."""
    dropout: nn.Module | None
    """Active dropout on A's input; None where A reads the same input as the base layer."""

    def small(self, x: torch.Tensor) -> torch.Tensor:
        """Return dropout(x) A' [M, R]."""
        return functional.linear(x if self.dropout is None else self.dropout(x), self.first)


class Adapted(Protocol):
    """A layer ``base_layer(x) + (dropout(x) A') (s B)'`` that exposes its parts (``adapters.lora_layers``)."""

    base_layer: nn.Module

    def low_rank_update(self, dtype: torch.dtype) -> LowRankUpdate | None:
        """Return the update with its matrices in ``dtype``, or None if the layer currently computes something else.

        That is the case with no adapter, several adapters, DoRA, or offloaded weights.
        """


def swiglu_mlp(gate: nn.Module, up: nn.Module, down: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return down(silu(gate(x)) * up(x)) for x [M, D]."""
    if isinstance(gate, Fp8Linear) and isinstance(up, Fp8Linear) and isinstance(down, Fp8Linear):
        return frozen_gated_mlp(x, gate, up, down)
    if kernel_available(x) and x.shape[0] > 0:
        updates = [_narrow_update(layer, x.dtype) for layer in (gate, up, down)]
        known = [update for update in updates if update is not None]
        if len(known) == 3:
            return _updated([cast(Adapted, layer) for layer in (gate, up, down)], known, x)
    inner = gate(x)
    if inference_kernel_available(inner):
        inner = decode.silu_product(inner, up(x))
    else:
        inner = functional.silu(inner)
        inner = inner * up(x)
    found: torch.Tensor = down(inner)
    return found


def _narrow_update(layer: Any, dtype: torch.dtype) -> LowRankUpdate | None:
    update = layer.low_rank_update(dtype) if hasattr(layer, "low_rank_update") else None
    return None if update is None or update.first.shape[0] > _WIDEST_RANK else update


def _updated(layers: Sequence[Adapted], updates: Sequence[LowRankUpdate], x: torch.Tensor) -> torch.Tensor:
    gate, up, down = layers
    of_gate, of_up, of_down = updates
    if of_gate.dropout is None and of_up.dropout is None:  # x is read once for both
        small = x @ torch.cat([of_gate.first, of_up.first]).t()
    else:
        small = torch.cat([of_gate.small(x), of_up.small(x)], dim=1)
    parts = gate.base_layer(x), up.base_layer(x), small, of_gate.second, of_up.second
    if of_down.dropout is None:
        inner, last = GatedProduct.apply(*parts, of_down.first)
    else:  # with dropout, down's update and its base layer read different inputs, so their gradients cannot be fused
        inner, _ = GatedProduct.apply(*parts, None)
        last = of_down.small(inner)
    return add_product(down.base_layer(inner), last, of_down.second)


class GatedProduct(torch.autograd.Function):
    """``silu(gate + gate_small gate_matrix') * (up + up_small up_matrix')`` [M, I], and that times ``first'`` [M, R].

    ``first`` [R, I] is the A matrix of the following layer's update: its gradient joins the other one inside the
    backward kernel. Without ``first`` there is no second result. ``small`` holds gate_small's columns, then up_small's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        small: torch.Tensor,
        gate_matrix: torch.Tensor,
        up_matrix: torch.Tensor,
        first: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = (gate, up, small, gate_matrix, up_matrix)
        inner = swiglu.product_on_gpu(*parts) if gate.is_cuda else _product(*parts)
        ctx.save_for_backward(*parts, first, None if first is None else inner)
        return inner, None if first is None else inner @ first.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *parts, first, inner = ctx.saved_tensors
        gate, _, small, gate_matrix, up_matrix = parts
        incoming, last = gradients[0].contiguous(), None if first is None else gradients[1].contiguous()
        compute = swiglu.gradients_on_gpu if gate.is_cuda else _gradients
        to_gate, to_up = compute(incoming, last, first, *parts)
        gate_small, up_small = small.split([gate_matrix.shape[1], up_matrix.shape[1]], dim=1)
        to_small = torch.cat([to_gate @ gate_matrix, to_up @ up_matrix], dim=1)
        to_first = None if last is None else last.t() @ inner
        return to_gate, to_up, to_small, to_gate.t() @ gate_small, to_up.t() @ up_small, to_first


def _inputs(
    gate: torch.Tensor, up: torch.Tensor, small: torch.Tensor, gate_matrix: torch.Tensor, up_matrix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input of silu and its factor, in float32."""
    gate_small, up_small = small.float().split([gate_matrix.shape[1], up_matrix.shape[1]], dim=1)
    return gate.float() + gate_small @ gate_matrix.float().t(), up.float() + up_small @ up_matrix.float().t()


def _product(*parts: torch.Tensor) -> torch.Tensor:
    gate, up = _inputs(*parts)
    return cast_unless_same(functional.silu(gate) * up, parts[0].dtype)


def _gradients(
    gradient: torch.Tensor, down_small: torch.Tensor | None, down_matrix: torch.Tensor | None, *parts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = _inputs(*parts)
    incoming, sigmoid = gradient.float(), torch.sigmoid(gate)
    if down_small is not None and down_matrix is not None:
        incoming = incoming + down_small.float() @ down_matrix.float()
    to_gate = incoming * up * sigmoid * (1 + gate * (1 - sigmoid))
    return to_gate.to(gradient.dtype), (incoming * gate * sigmoid).to(gradient.dtype)
