"""Fused gather and rotary embedding of queries, keys and values, and its backward pass, for GPUs with Triton. Imported
only there.

One program per token: it reads the token's row of the fused projection once and writes the heads once, or vice versa.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _turned(heads_in, out, c, s, heads: tl.constexpr, half: tl.constexpr, heads_block: tl.constexpr,
            half_block: tl.constexpr):  # fmt: skip
    """Rotate both halves of every head of one token."""
    h, e = tl.arange(0, heads_block)[:, None], tl.arange(0, half_block)[None, :]
    inside = (h < heads) & (e < half)
    place = h * (2 * half) + e
    first = tl.load(heads_in + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads_in + place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + half, (first * s + second * c).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _table(table, at, half: tl.constexpr, half_block: tl.constexpr):
    e = tl.arange(0, half_block)
    return tl.load(table + at * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _copy(source, out, count: tl.constexpr, block: tl.constexpr):
    place = tl.arange(0, block)
    tl.store(out + place, tl.load(source + place, mask=place < count, other=0.0), mask=place < count)


@triton.jit
def _into_rows(qkv, cos, sin, to_rows, q, k, v, heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr,
            heads_block: tl.constexpr, kv_block: tl.constexpr, half_block: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    token = tl.load(to_rows + at)
    c, s = _table(cos, at, half, half_block), _table(sin, at, half, half_block)
    queries: tl.constexpr = heads * 2 * half
    keys: tl.constexpr = kv_heads * 2 * half
    qkv += token * (queries + 2 * keys)
    _turned(qkv, q + at * queries, c, s, heads, half, heads_block, half_block)
    _turned(qkv + queries, k + at * keys, c, s, kv_heads, half, kv_block, half_block)
    _copy(qkv + queries + keys, v + at * keys, keys, kv_block * 2 * half_block)


@triton.jit
def _from_rows(q, k, v, cos, sin, from_rows, out, heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr,
            heads_block: tl.constexpr, kv_block: tl.constexpr, half_block: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(from_rows + token)
    c, s = _table(cos, at, half, half_block), -_table(sin, at, half, half_block)
    queries: tl.constexpr = heads * 2 * half
    keys: tl.constexpr = kv_heads * 2 * half
    out += token * (queries + 2 * keys)
    _turned(q + at * queries, out, c, s, heads, half, heads_block, half_block)
    _turned(k + at * keys, out + queries, c, s, kv_heads, half, kv_block, half_block)
    _copy(v + at * keys, out + queries + keys, keys, kv_block * 2 * half_block)


def into_rows_on_gpu(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, to_rows: torch.Tensor, rows: int,
    sizes: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return rotated queries [B, S, H, E], rotated keys [B, S, K, E] and values from the fused projection [T, F],
    contiguous. Tables are [B, 1, S, E/2]; ``to_rows`` [B*S]: the token of every column."""
    heads, kv_heads, width = sizes
    columns = to_rows.shape[0] // rows
    q, k, v = (qkv.new_empty(rows, columns, count, width) for count in (heads, kv_heads, kv_heads))
    if to_rows.shape[0]:
        _into_rows[(to_rows.shape[0],)](qkv, cos.contiguous(), sin.contiguous(), to_rows, q, k, v, **_blocks(sizes))
    return q, k, v


def from_rows_on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, from_rows: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of the fused projection [T, F] from those of rotated queries [B, S, H, E], rotated keys
    [B, S, K, E] and values, all contiguous. Tables are [B, 1, S, E/2]; ``from_rows`` [T]: b * S + column per token."""
    sizes = q.shape[2], k.shape[2], q.shape[3]
    out = q.new_empty(from_rows.shape[0], (sizes[0] + 2 * sizes[1]) * sizes[2])
    if from_rows.shape[0]:
        _from_rows[(from_rows.shape[0],)](q, k, v, cos.contiguous(), sin.contiguous(), from_rows, out, **_blocks(sizes))
    return out


def _blocks(sizes: tuple[int, int, int]) -> dict[str, int]:
    heads, kv_heads, width = sizes
    power = triton.next_power_of_2
    return {
        "heads": heads, "kv_heads": kv_heads, "half": width // 2, "heads_block": power(heads),
        "kv_block": power(kv_heads), "half_block": power(width // 2), "num_warps": 4,
    }  # fmt: skip
