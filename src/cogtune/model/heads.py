"""The heads of every token, from sorted order into rows and rotated, and their gradients on the way back.

Each direction is one pass over memory. Left to the compiler, the gradients of the three kinds of heads are rotated and
put beside each other in one kernel, slowly, and gathered in the next.

Shapes: T tokens in sorted order, B rows, S columns, H query heads, K key/value heads, E head width, F fused projection
((H + 2K) * E: all of q, then k, then v).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from cogtune.model.rope import rotate
from cogtune.model.routing import Routing

_TRITON = importlib.util.find_spec("triton") is not None
if _TRITON:
    from cogtune.model import heads_kernel

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [B, H, S, E], keys and values [B, K, S, E]."""


def rotated_heads(
    qkv_TF: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, routing: Routing, num_heads: int, num_kv_heads: int
) -> Heads:
    """Queries and keys, rotated by their columns' tables [B, 1, S, E/2], and values.

    A column without a token repeats the first token; attention never lets it reach a real one, so it brings no gradient
    back.
    """
    if routing.to_rows is None or routing.from_rows is None:
        return _rotated(qkv_TF, cos, sin, routing.num_rows, num_heads, num_kv_heads)
    found: Heads = _Heads.apply(
        qkv_TF, cos, sin, routing.to_rows, routing.from_rows, routing.num_rows, num_heads, num_kv_heads
    )
    return found


def _rotated(
    qkv_RF: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rows: int, num_heads: int, num_kv_heads: int
) -> Heads:
    count = num_heads + 2 * num_kv_heads
    heads = qkv_RF.view(rows, qkv_RF.shape[0] // rows, count, qkv_RF.shape[1] // count).transpose(1, 2)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        to_rows: torch.Tensor,
        from_rows: torch.Tensor,
        rows: int,
        num_heads: int,
        num_kv_heads: int,
    ) -> Heads:
        ctx.save_for_backward(cos, sin, from_rows)
        return _rotated(qkv.index_select(0, to_rows), cos, sin, rows, num_heads, num_kv_heads)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        compute = heads_kernel.gathered_on_gpu if _has_kernel(gradients[0]) else _gathered
        return compute(*gradients, *ctx.saved_tensors), *(None,) * 7


def _has_kernel(x: torch.Tensor) -> bool:
    return _TRITON and x.is_cuda and x.dtype != torch.float64


def _gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, from_rows: torch.Tensor
) -> torch.Tensor:
    """Gradients of the heads as the gradient of what they were made of [T, F]: a rotation's is the rotation back."""
    heads = torch.cat([rotate(q, cos, -sin), rotate(k, cos, -sin), v], dim=1).transpose(1, 2)
    return heads.reshape(heads.shape[0] * heads.shape[1], -1).index_select(0, from_rows)
