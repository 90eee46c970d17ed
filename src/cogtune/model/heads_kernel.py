"""The kernel that gathers the gradients of all heads and rotates them back, for GPUs with Triton. Imported only there.

One program a token: its row of each gradient is read once, and the row of all three is written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _turned_back(gradient, out, c, s, heads: tl.constexpr, half: tl.constexpr, head_stride,
                 heads_block: tl.constexpr, half_block: tl.constexpr):  # fmt: skip
    """Both halves of every head of one token, by minus its angles."""
    h, e = tl.arange(0, heads_block)[:, None], tl.arange(0, half_block)[None, :]
    inside = (h < heads) & (e < half)
    first = tl.load(gradient + h * head_stride + e, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(gradient + h * head_stride + half + e, mask=inside, other=0.0).to(tl.float32)
    place = out + h * (2 * half) + e
    tl.store(place, (first * c + second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(place + half, (second * c - first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gather(q, k, v, cos, sin, from_rows, out, columns, q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head,
            v_column, heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr, heads_block: tl.constexpr,
            kv_block: tl.constexpr, half_block: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(from_rows + token)
    row, column = at // columns, at % columns
    e = tl.arange(0, half_block)
    c = tl.load(cos + at * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + at * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    out += token * ((heads + 2 * kv_heads) * 2 * half)
    _turned_back(q + row * q_row + column * q_column, out, c, s, heads, half, q_head, heads_block, half_block)
    out += heads * 2 * half
    _turned_back(k + row * k_row + column * k_column, out, c, s, kv_heads, half, k_head, kv_block, half_block)
    out += kv_heads * 2 * half
    h, both = tl.arange(0, kv_block)[:, None], tl.arange(0, 2 * half_block)[None, :]
    inside = (h < kv_heads) & (both < 2 * half)
    value = tl.load(v + row * v_row + column * v_column + h * v_head + both, mask=inside, other=0.0)
    tl.store(out + h * (2 * half) + both, value, mask=inside)


def gathered_on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, from_rows: torch.Tensor
) -> torch.Tensor:
    """Gradients of rotated queries [B, H, S, E] and keys [B, K, S, E] and of values as the gradient of the tokens' fused
    projection [T, F]. Tables [B, 1, S, E/2]; ``from_rows`` [T]: b * S + column of every token."""
    (_, heads, columns, width), kv_heads = q.shape, k.shape[1]
    out = q.new_empty(from_rows.shape[0], (heads + 2 * kv_heads) * width)
    if out.shape[0] == 0:
        return out
    q, k, v = (part if part.stride(3) == 1 else part.contiguous() for part in (q, k, v))
    _gather[(out.shape[0],)](
        q, k, v, cos.contiguous(), sin.contiguous(), from_rows, out, columns,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads=heads, kv_heads=kv_heads, half=width // 2,
        heads_block=triton.next_power_of_2(heads), kv_block=triton.next_power_of_2(kv_heads),
        half_block=triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip
    return out
