"""Expressions written differently to suit torch's compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def cast_unless_same(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``x`` in ``dtype``, without a no-op conversion.

    Under torch 2.11's compiler, an autograd function that returns the result of a no-op conversion silently passes no
    gradient on.
    """
    return x if x.dtype == dtype else x.to(dtype)


def add_product(onto: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``onto + x weight'`` for onto [..., O], x [..., R] and weight [O, R], all in one dtype.

    When compiling, the addition is left to the kernel that reads the sum. The compiler turns a plain one into addmm, a
    library call that first copies ``onto``. With rank 16 adapters on all linear layers this saves 10 of 160 ms per step
    (docs/log.md, 2026-11-30).
    """
    if torch.compiler.is_compiling():
        added: torch.Tensor = _LazySum.apply(onto, functional.linear(x, weight))
        return added
    return torch.addmm(onto, x, weight.t()) if x.dim() == 2 else onto + functional.linear(x, weight)


class _LazySum(torch.autograd.Function):
    """Addition that the compiler fuses into its consumer.

    The cast keeps the sum from being folded into addmm; the custom backward pass avoids copies of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, onto: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return cast_unless_same(onto.float() + update.float(), onto.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient
