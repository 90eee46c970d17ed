"""Two expressions that torch's compiler needs written differently."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def cast_unless_same(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``. Compiled by torch 2.11, an autograd function that returns the result of a conversion that
    changes nothing passes no gradient on, and nothing says so."""
    return x if x.dtype == dtype else x.to(dtype)


def add_product(onto: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``onto + x weight'`` for onto [..., O], x [..., R] and weight [O, R], all in one number format.

    Compiled, the sum is left to the kernel that reads it: of a plain one torch's compiler makes a library call that
    begins with a copy of ``onto``. With adapters of rank 16 on all linear layers that is worth 10 of 160 ms a step
    (docs/log.md, 2026-11-30).
    """
    if torch.compiler.is_compiling():
        added: torch.Tensor = _LazySum.apply(onto, functional.linear(x, weight))
        return added
    return torch.addmm(onto, x, weight.t()) if x.dim() == 2 else onto + functional.linear(x, weight)


class _LazySum(torch.autograd.Function):
    """The cast keeps the sum apart from the product; without a gradient of its own it would cost a copy of that."""

    @staticmethod
    def forward(ctx: Any, onto: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return cast_unless_same(onto.float() + update.float(), onto.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient
