"""down(silu(gate(x)) * up(x)), the way that suits what the three layers are.

Plain layers leave it to the compiler. Three fp8 layers round between them (``model.quantized.fp8``). Three layers with
low-rank updates would write every updated activation once more, each three times the size of x; their updates are taken
into the product instead and its gradient, and those activations are never written.

Shapes: M tokens, D hidden, I inner width, R ranks of the updates.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn import functional

from cogtune.model.casting import converted
from cogtune.model.fork import fork
from cogtune.model.kernels import HAS_TRITON, kernel_available
from cogtune.model.quantized.fp8 import Fp8Linear, frozen_gated_mlp

if HAS_TRITON:
    from cogtune.model.kernels import swiglu

_WIDEST_RANK = 64  # of an update whose blocks fit beside a tile; wider ones are computed layer by layer


class Updated(Protocol):
    """A linear layer ``base(x) + (x A') (s B)'`` that can be asked for its parts (``adapters.lora_layers``)."""

    def update_rank(self) -> int | None:
        """R; None where the layer does not compute in this way now (no adapter, several, DoRA, weights elsewhere)."""

    def drops_inputs(self) -> bool:
        """Whether A sees another input than the base, because of dropout."""

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """base(x) [M, O]."""

    def small(self, x: torch.Tensor) -> torch.Tensor:
        """x A' [M, R], dropout included."""

    def first_matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """A [R, I]."""

    def second_matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """s B [O, R]."""

    def finish(self, x: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        """The layer's output, given x A' as well."""


def gated(gate: nn.Module, up: nn.Module, down: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) for x [M, D]."""
    if isinstance(gate, Fp8Linear) and isinstance(up, Fp8Linear) and isinstance(down, Fp8Linear):
        return frozen_gated_mlp(x, gate, up, down)
    if kernel_available(x) and all(_takes_part(layer) for layer in (gate, up, down)) and x.shape[0] > 0:
        first, second, last = (cast(Updated, layer) for layer in (gate, up, down))
        return _updated(first, second, last, x)
    x_gate, x_up = fork(x, 2)
    found: torch.Tensor = down(functional.silu(gate(x_gate)) * up(x_up))
    return found


def _updated(gate: Updated, up: Updated, down: Updated, x: torch.Tensor) -> torch.Tensor:
    if gate.drops_inputs() or up.drops_inputs():
        x_gate, x_up, *others = fork(x, 4)
        small = torch.cat([gate.small(others[0]), up.small(others[1])], dim=1)
    else:  # x is read once for both
        x_gate, x_up, x_small = fork(x, 3)
        small = x_small @ torch.cat([gate.first_matrix(x.dtype), up.first_matrix(x.dtype)]).t()
    parts = gate.base(x_gate), up.base(x_up), small, gate.second_matrix(x.dtype), up.second_matrix(x.dtype)
    if down.drops_inputs():  # its update sees another input than its base, whose gradient is masked on its way back
        inner, _ = GatedProduct.apply(*parts, None)
        return down.finish(inner, down.small(inner))
    inner, last = GatedProduct.apply(*parts, down.first_matrix(x.dtype))
    return down.finish(inner, last)


def _takes_part(layer: Any) -> bool:
    rank = layer.update_rank() if hasattr(layer, "update_rank") else None
    return rank is not None and rank <= _WIDEST_RANK


class GatedProduct(torch.autograd.Function):
    """``silu(gate + gate_small gate_matrix') * (up + up_small up_matrix')`` [M, I], and that times ``first'`` [M, R],
    where ``first`` [R, I] is the first matrix of an update of what follows: the gradient that comes back through it
    joins the other inside the kernel. Without ``first`` there is no second result. ``small`` is gate_small's columns,
    then up_small's."""

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
    """What silu sees, and what it is multiplied by, float32."""
    gate_small, up_small = small.float().split([gate_matrix.shape[1], up_matrix.shape[1]], dim=1)
    return gate.float() + gate_small @ gate_matrix.float().t(), up.float() + up_small @ up_matrix.float().t()


def _product(*parts: torch.Tensor) -> torch.Tensor:
    gate, up = _inputs(*parts)
    return converted(functional.silu(gate) * up, parts[0].dtype)


def _gradients(
    gradient: torch.Tensor, down_small: torch.Tensor | None, down_matrix: torch.Tensor | None, *parts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = _inputs(*parts)
    incoming, sigmoid = gradient.float(), torch.sigmoid(gate)
    if down_small is not None and down_matrix is not None:
        incoming = incoming + down_small.float() @ down_matrix.float()
    to_gate = incoming * up * sigmoid * (1 + gate * (1 - sigmoid))
    return to_gate.to(gradient.dtype), (incoming * gate * sigmoid).to(gradient.dtype)
