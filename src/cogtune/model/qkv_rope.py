"""Queries, keys and values from sorted order into rows, with rotary embedding, and the backward pass.

In a layer compiled for a GPU each direction is one fused kernel. The compiler alone would generate three for the
forward pass. In the backward pass it would rotate and concatenate the gradients in one kernel and gather them in the
next. Without gradients the kernel runs outside of compiled layers too.

Shapes: T tokens in sorted order, B rows, S columns, H query heads, K key/value heads, E head width, F fused projection
((H + 2K) * E: all of q, then k, then v).
"""

from __future__ import annotations

from typing import Any

import torch

from cogtune.model.kernels import HAS_TRITON, inference_kernel_available, kernel_available
from cogtune.model.rope import rotate
from cogtune.model.routing import Routing

if HAS_TRITON:
    from cogtune.model.kernels import qkv_rope

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [B, H, S, E], keys and values [B, K, S, E]."""


def rotate_into_rows(
    qkv_TF: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, routing: Routing, sizes: tuple[int, int, int]
) -> Heads:
    """Return rotated queries and keys, and values, in the row layout. Tables are [B, 1, S, E/2]; ``sizes`` is H, K, E.

    A column without a token repeats the first token. Attention never lets it reach a real token, so its gradient is 0.
    """
    if routing.to_rows is None or routing.from_rows is None:
        return _rotated(qkv_TF, cos, sin, routing.num_rows, sizes)
    if inference_kernel_available(qkv_TF, cos, routing.to_rows) and _fits_kernel(qkv_TF):
        return _by_kernel(qkv_TF, cos, sin, routing.to_rows, routing.num_rows, sizes)
    found: Heads = _Heads.apply(qkv_TF, cos, sin, routing.to_rows, routing.from_rows, routing.num_rows, sizes)
    return found


def _rotated(
    qkv_RF: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rows: int, sizes: tuple[int, int, int]
) -> Heads:
    queries, keys, width = sizes
    heads = qkv_RF.view(rows, qkv_RF.shape[0] // rows, queries + 2 * keys, width)
    q, k, v = heads.split([queries, keys, keys], dim=2)
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    # Keep all heads of a token adjacent in memory: attention's gradients then have the layout the backward pass reads.
    return rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)


def _by_kernel(
    qkv_TF: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    to_rows: torch.Tensor,
    rows: int,
    sizes: tuple[int, int, int],
) -> Heads:
    """Rounds once, like the compiler's own kernel; the eager path rounds each product with a bfloat16 table."""
    q, k, v = qkv_rope.into_rows_on_gpu(qkv_TF, cos, sin, to_rows, rows, sizes)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


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
        sizes: tuple[int, int, int],
    ) -> Heads:
        ctx.save_for_backward(cos, sin, from_rows)
        if not torch.compiler.is_compiling():
            return _rotated(qkv.index_select(0, to_rows), cos, sin, rows, sizes)
        if not _fits_kernel(qkv):
            q, k, v = _rotated(qkv.index_select(0, to_rows), cos, sin, rows, sizes)
            return q, k, v.clone()  # a view would keep the whole projection alive
        return _by_kernel(qkv.contiguous(), cos, sin, to_rows, rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Force the layout explicitly: a compiler assumes that gradients have the strides of the outputs.
        by_token = (gradient.transpose(1, 2).contiguous() for gradient in gradients)
        compute = qkv_rope.from_rows_on_gpu if _fits_kernel(gradients[0]) else _from_rows
        return compute(*by_token, *ctx.saved_tensors), *(None,) * 6


def _fits_kernel(x: torch.Tensor) -> bool:
    return kernel_available(x) and x.dtype != torch.float64


def _from_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, from_rows: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of the fused projection [T, F] from those of the heads [B, S, H or K, E].

    The gradient of a rotation is the inverse rotation.
    """
    cos, sin = cos.transpose(1, 2), -sin.transpose(1, 2)
    heads = torch.cat([rotate(q, cos, sin), rotate(k, cos, sin), v], dim=2)
    return heads.view(heads.shape[0] * heads.shape[1], -1).index_select(0, from_rows)
