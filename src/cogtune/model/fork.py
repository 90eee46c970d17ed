"""One activation for several readers, whose gradients are added where their sum is read."""

from __future__ import annotations

from typing import Any

import torch


def fork(x: torch.Tensor, readers: int) -> tuple[torch.Tensor, ...]:
    """``x`` once for each reader. To a compiler the sum of their gradients is then elementwise work that it fuses with
    what reads it: of a plain sum of products torch's makes library calls that each begin with a copy of the sum so far.
    """
    if not (torch.compiler.is_compiling() and x.requires_grad):
        return (x,) * readers
    found: tuple[torch.Tensor, ...] = _Fork.apply(x, readers)
    return found


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, readers: int) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(readers))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].float()
        for gradient in gradients[1:]:
            total = total + gradient.float()
        return total.to(gradients[0].dtype), None
