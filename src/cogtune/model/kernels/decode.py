"""Fused kernels of a decode step, for GPUs with Triton. Imported only there.

A step is bandwidth-bound: it reads every weight of the language expert once, and the keys and values of its rows. These
kernels avoid kernel launches and round trips of small tensors through memory. Weights are read in their storage format
(16 bits, fp8, int8, NF4) and multiplied in float32. Attention is in ``kernels.slot_attention``.

Shapes: R rows, I input and O output features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

PLAIN, FP8, INT8, NF4 = 0, 1, 2, 3
MOST_ROWS, MOST_GATED_ROWS = 16, 64
"""Most rows of `linear` for which it is faster than library kernels (docs/log.md, 2026-11-30): of one product, and of
two that share their input."""


@triton.jit
def _taken(x, weight, at, mask, normed: tl.constexpr):
    """Return inputs in float32, times the norm's weight if there is one, and the inputs' squares."""
    plain = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    values = plain
    if normed:
        values = plain * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    return values, plain * plain


@triton.jit
def _scales(absmax, outer, table, offset, first, blocks: tl.constexpr, per_outer: tl.constexpr, nested: tl.constexpr):
    """Return the scales of ``blocks`` adjacent blocks of 64 values; ``first`` [N, 1] is the first block's index."""
    at = first + tl.arange(0, blocks)[None, :]
    scale = tl.load(absmax + at)
    if nested:
        scale = tl.load(table + scale.to(tl.int32)) * tl.load(outer + at // per_outer) + tl.load(offset)
    return scale


@triton.jit
def _dense(x, norm, weight, n, k0, ins: tl.constexpr, block_k: tl.constexpr, kind: tl.constexpr,
           normed: tl.constexpr):  # fmt: skip
    """Return products [block_n, 1] of one row with ``block_k`` columns of the weight, and its sum of squares [1]."""
    k = k0 + tl.arange(0, block_k)
    inside = k < ins
    values, squares = _taken(x, norm, k, inside, normed)
    stored = tl.load(weight + (n * ins)[:, None] + k[None, :], mask=inside[None, :], other=0)
    if kind == 1:
        stored = stored.to(tl.float8e4nv, bitcast=True)
    return tl.sum(stored.to(tl.float32) * values[None, :], 1)[:, None], tl.zeros([1], tl.float32) + tl.sum(squares, 0)


@triton.jit
def _packed(x, norm, weight, code, absmax, outer, table, offset, n, k0, ins: tl.constexpr, groups: tl.constexpr,
            per_outer: tl.constexpr, nested: tl.constexpr, normed: tl.constexpr):  # fmt: skip
    """Like `_dense` for an NF4 weight, but per block of 64 values: [block_n, groups] and [groups]. Reducing over the
    blocks in every iteration would cost more than the iteration itself."""
    byte = tl.arange(0, groups)[:, None] * 32 + tl.arange(0, 32)[None, :]
    j = k0 // 2 + byte
    even, squares = _taken(x, norm, 2 * j, j >= 0, normed)
    odd, others = _taken(x, norm, 2 * j + 1, j >= 0, normed)
    both = tl.load(weight + (n * (ins // 2))[:, None, None] + j[None, :, :]).to(tl.int32)
    products = tl.load(code + (both >> 4)) * even[None, :, :] + tl.load(code + (both & 15)) * odd[None, :, :]
    first = (n * (ins // 64) + k0 // 64)[:, None]
    scale = _scales(absmax, outer, table, offset, first, groups, per_outer, nested)
    return tl.sum(products, 2) * scale, tl.sum(squares + others, 1)


@triton.jit
def _is_owned(n, adapters, each: tl.constexpr, stacked: tl.constexpr):
    """Return whether feature n of stacked first matrices belongs to a row's adapter. With two stacks that share their
    input, the second one follows the first."""
    return (n // each) % stacked == adapters


@triton.jit
def _added(found, small, second, adapters, at, rank: tl.constexpr, each: tl.constexpr):
    """Return one row's products plus its update [block_n]. Of several adapters only the row's own is read."""
    start = 0
    if each < rank:
        start = tl.load(adapters) * each
    if start >= 0:
        r = start + tl.arange(0, each)
        update = tl.load(second + at[:, None] * rank + r[None, :]).to(tl.float32)
        found += tl.sum(update * tl.load(small + r).to(tl.float32)[None, :], 1)
    return found


@triton.jit
def _vector(x, norm, w0, s0, w1, s1, out, residual, small0, second0, small1, second1, adapters, code, outer0, outer1,
            table, offset0, offset1, outs, eps, ins: tl.constexpr, rank: tl.constexpr, each: tl.constexpr,
            stacked: tl.constexpr, kind: tl.constexpr, gated: tl.constexpr, adds: tl.constexpr, normed: tl.constexpr,
            per_outer: tl.constexpr, nested: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr):  # fmt: skip
    n = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    inside = n < outs
    at = tl.where(inside, n, 0)
    if stacked > 0:
        owned = _is_owned(n, tl.load(adapters), each, stacked)
        if tl.max(owned.to(tl.int32), 0) == 0:
            tl.store(out + n, tl.zeros([block_n], out.dtype.element_ty), mask=inside)
            return
    columns: tl.constexpr = block_k // 64 if kind == 3 else 1
    sums0 = tl.zeros([block_n, columns], tl.float32)
    sums1 = tl.zeros([block_n, columns], tl.float32)
    square = tl.zeros([columns], tl.float32)
    for k0 in range(0, ins, block_k):
        if kind == 3:
            part, squares = _packed(x, norm, w0, code, s0, outer0, table, offset0, at, k0, ins, columns, per_outer,
                                    nested, normed)  # fmt: skip
        else:
            part, squares = _dense(x, norm, w0, at, k0, ins, block_k, kind, normed)
        sums0 += part
        square += squares
        if gated:
            if kind == 3:
                part, squares = _packed(x, norm, w1, code, s1, outer1, table, offset1, at, k0, ins, columns, per_outer,
                                        nested, normed)  # fmt: skip
            else:
                part, squares = _dense(x, norm, w1, at, k0, ins, block_k, kind, normed)
            sums1 += part
    first = tl.sum(sums0, 1)
    second = tl.sum(sums1, 1)
    if normed:
        scale = tl.rsqrt(tl.sum(square, 0) / ins + eps)
        first *= scale
        second *= scale
    if kind == 1 or kind == 2:
        first *= tl.load(s0 + at)
        if gated:
            second *= tl.load(s1 + at)
    if rank > 0:
        first = _added(first, small0, second0, adapters, at, rank, each)
        if gated:
            second = _added(second, small1, second1, adapters, at, rank, each)
    kept = out.dtype.element_ty
    found = first
    if gated:
        gate = first.to(kept).to(tl.float32)
        found = (gate / (1 + tl.exp(-gate))).to(kept).to(tl.float32) * second.to(kept).to(tl.float32)
    if adds:
        found = found.to(kept).to(tl.float32) + tl.load(residual + at).to(tl.float32)
    if stacked > 0:
        found = tl.where(_is_owned(n, tl.load(adapters), each, stacked), found, 0.0)
    tl.store(out + n, found.to(kept), mask=inside)


@triton.jit
def _tile(x, weight, rows, n, k0, ins: tl.constexpr, block_r: tl.constexpr, block_k: tl.constexpr, kind: tl.constexpr,
          exact: tl.constexpr):  # fmt: skip
    """Return partial products [block_r, block_n] of several rows with ``block_k`` columns of the weight."""
    r = tl.arange(0, block_r)
    k = k0 + tl.arange(0, block_k)
    inside = k < ins
    values = tl.load(x + (r * ins)[:, None] + k[None, :], mask=(r < rows)[:, None] & inside[None, :], other=0.0)
    stored = tl.load(weight + (n * ins)[:, None] + k[None, :], mask=inside[None, :], other=0)
    if kind == 1:
        stored = stored.to(tl.float8e4nv, bitcast=True)
    return tl.dot(values, tl.trans(stored.to(x.dtype.element_ty)), input_precision=exact)


@triton.jit
def _added_rows(found, small, second, at, r, rows, small_stride, rank: tl.constexpr, each: tl.constexpr,
                exact: tl.constexpr):  # fmt: skip
    """Return several rows' products plus their updates [block_r, block_n]. Of several adapters a row's values of x A'
    are 0 at all but its own; parts that are 0 for every row are not read."""
    real = (r < rows)[:, None]
    part: tl.constexpr = rank if each == rank else (each if each > 128 else 128)
    for start in range(0, rank, part):
        q = start + tl.arange(0, part)
        there = (q < rank)[None, :]
        values = tl.load(small + (r * small_stride)[:, None] + q[None, :], mask=real & there, other=0.0)
        if each == rank:
            update = tl.load(second + at[:, None] * rank + q[None, :])
            found += tl.dot(values, tl.trans(update), input_precision=exact)
        elif tl.max(tl.max(tl.abs(values.to(tl.float32)), 1), 0) > 0:
            update = tl.load(second + at[:, None] * rank + q[None, :], mask=there, other=0.0)
            found += tl.dot(values, tl.trans(update), input_precision=exact)
    return found


@triton.jit
def _few(x, w0, s0, w1, s1, out, residual, small0, second0, small1, second1, adapters, rows, outs, small_stride,
         ins: tl.constexpr, rank: tl.constexpr, each: tl.constexpr, stacked: tl.constexpr, kind: tl.constexpr,
         gated: tl.constexpr, adds: tl.constexpr, exact: tl.constexpr, block_r: tl.constexpr, block_n: tl.constexpr,
         block_k: tl.constexpr):  # fmt: skip
    n = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    r = tl.arange(0, block_r)
    inside = (n < outs)[None, :] & (r < rows)[:, None]
    at = tl.where(n < outs, n, 0)
    place = r.to(tl.int64)[:, None] * outs + n[None, :]
    if stacked > 0:
        own = tl.load(adapters + r, mask=r < rows, other=-1)
        owned = _is_owned(n[None, :], own[:, None], each, stacked)
        if tl.max(tl.max(owned.to(tl.int32), 1), 0) == 0:
            tl.store(out + place, tl.zeros([block_r, block_n], out.dtype.element_ty), mask=inside)
            return
    first = tl.zeros([block_r, block_n], tl.float32)
    second = tl.zeros([block_r, block_n], tl.float32)
    for k0 in range(0, ins, block_k):
        first += _tile(x, w0, rows, at, k0, ins, block_r, block_k, kind, exact)
        if gated:
            second += _tile(x, w1, rows, at, k0, ins, block_r, block_k, kind, exact)
    if kind == 1 or kind == 2:
        first *= tl.load(s0 + at)[None, :]
        if gated:
            second *= tl.load(s1 + at)[None, :]
    if rank > 0:
        first = _added_rows(first, small0, second0, at, r, rows, small_stride, rank, each, exact)
        if gated:
            second = _added_rows(second, small1, second1, at, r, rows, small_stride, rank, each, exact)
    kept = out.dtype.element_ty
    found = first
    if gated:
        gate = first.to(kept).to(tl.float32)
        found = (gate / (1 + tl.exp(-gate))).to(kept).to(tl.float32) * second.to(kept).to(tl.float32)
    if adds:
        found = found.to(kept).to(tl.float32) + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if stacked > 0:
        found = tl.where(_is_owned(n[None, :], tl.load(adapters + r, mask=r < rows, other=-1)[:, None], each, stacked),
                         found, 0.0)  # fmt: skip
    tl.store(out + place, found.to(kept), mask=inside)


@triton.jit
def _norm(x, weight, out, eps, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, block)
    inside = d < width
    values, squares = _taken(x + row * width, weight, d, inside, True)
    normed = values * tl.rsqrt(tl.sum(squares, 0) / width + eps)
    tl.store(out + row * width + d, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(first, second, out, total, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < total
    gate = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    found = silu * tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


class Weight:
    """A frozen weight [O, I] as its layer stores it.

    Args:
        kind: `PLAIN`, `FP8` (uint8 bits), `INT8` or `NF4` (two codes a byte).
        data: [O, I], or for NF4 the packed codes.
        scale: float32 [O] for fp8 and int8; NF4's block scales, float32 or uint8.
        code: NF4's 16 values.
        outer, table, offset: NF4, for scales in 8 bits: their own scales, their 256 values, their offset.
        per_outer: NF4: blocks that share one of ``outer``.
    """

    def __init__(
        self,
        kind: int,
        data: torch.Tensor,
        shape: tuple[int, int],
        scale: torch.Tensor | None = None,
        code: torch.Tensor | None = None,
        outer: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        per_outer: int = 1,
    ) -> None:
        self.kind, self.data, self.shape, self.per_outer, self.nested = kind, data, shape, per_outer, outer is not None
        none = data  # placeholder: arguments that the kernel does not read must still be tensors
        self.scale = none if scale is None else scale
        self.code = none if code is None else code
        self.outer = none if outer is None else outer
        self.table = none if table is None else table
        self.offset = none if offset is None else offset


Update = tuple[torch.Tensor, torch.Tensor]
"""x A' [R, rank] and s B [O, rank]; the rank is a power of two, at least 16, or n times one (`Stack`)."""


class Stack(NamedTuple):
    """Several adapters' matrices, one behind the other: n of ``each`` ranks (a power of two, at least 16).

    Attributes:
        adapters: int64 [R], each row's adapter, -1 for none.
    """

    adapters: torch.Tensor
    n: int
    each: int


def linear(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: Weight | None = None,
    residual: torch.Tensor | None = None,
    updates: tuple[Update, Update] | tuple[Update] | None = None,
    stack: Stack | None = None,
    tiles: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Return ``x W'`` [R, O] of rows x [R, I], R at most 64; of a single row if the weight is NF4.

    Args:
        norm: weight [I] and epsilon of a root-mean-square norm applied to x before the product. For a single row, x
            times the norm's weight is multiplied, and the norm's scale is applied to the product.
        gated: a second weight G; the result is then silu(x W') * (x G').
        residual: [R, O], added to the result.
        updates: low-rank updates of ``weight`` and ``gated``.
        stack: with ``updates``, the adapters that their ranks belong to. Without, ``weight`` holds the first matrices
            of the adapters (O is n times ``each``, or twice that for two layers that share their input), and the result
            is 0 at features of adapters that are not the row's.
        tiles: block_n, block_k and num_warps in place of this function's choice.
    """
    rows, (features, width) = x.shape[0], weight.shape
    other = weight if gated is None else gated
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    rank = 0 if updates is None else updates[0][0].shape[1]
    small0, second0 = (x, x) if updates is None else updates[0]
    small1, second1 = (small0, second0) if updates is None or len(updates) == 1 else updates[1]
    each = rank if stack is None else stack.each
    stacked = 0 if stack is None or updates is not None else stack.n
    adapters = x if stack is None else stack.adapters
    tile = _tiles(rows, features, width, weight.kind, gated is not None) | (tiles or {})
    grid = (triton.cdiv(features, tile["block_n"]),)
    products = (
        weight.data, weight.scale, other.data, other.scale, out, x if residual is None else residual, small0, second0,
        small1, second1, adapters,
    )  # fmt: skip
    options = {
        "ins": width, "rank": rank, "each": each, "stacked": stacked, "kind": weight.kind, "gated": gated is not None,
        "adds": residual is not None, **tile,
    }  # fmt: skip
    if rows == 1:
        before, eps = (x, 0.0) if norm is None else norm
        stored = (weight.code, weight.outer, other.outer, weight.table, weight.offset, other.offset)
        _vector[grid](
            x, before, *products, *stored, features, eps, normed=norm is not None, per_outer=weight.per_outer,
            nested=weight.nested, **options,
        )  # fmt: skip
        return out
    if norm is not None:
        x = root_mean_square_norm(x, *norm)
    exact = "ieee" if x.dtype == torch.float32 else "tf32"
    block_r = max(16, triton.next_power_of_2(rows))
    _few[grid](x, *products, rows, features, small0.stride(0), exact=exact, block_r=block_r, **options)
    return out


def root_mean_square_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the norm [R, I] of the rows of x [R, I] times ``weight`` [I], rounded once."""
    out, width = torch.empty_like(x), x.shape[1]
    _norm[(x.shape[0],)](x, weight, out, eps, width=width, block=triton.next_power_of_2(width), num_warps=8)
    return out


def silu_product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return silu(first) * second [R, O] of contiguous tensors, in one launch; silu is rounded as torch rounds it."""
    out = torch.empty_like(first)
    _gate[(triton.cdiv(first.numel(), 2048),)](first, second, out, first.numel(), block=2048, num_warps=8)
    return out


def _tiles(rows: int, features: int, width: int, kind: int, gated: bool) -> dict[str, int]:
    """Return the tile sizes that were fastest on an H200 for this model's shapes (docs/log.md, 2026-11-30)."""
    if rows > 16:
        block_n, block_k, warps, stages = (64, 64, 4, 4) if gated else (32, 128, 4, 4)
    elif rows > 1:
        block_n, block_k, warps, stages = (64, 128, 4, 4) if gated or features > 65536 else (16, 256, 2, 4)
    elif features <= 512:  # the first matrix of an update
        block_n, block_k, warps, stages = 1, 4096, 8, 1
    elif features > 65536:
        block_n, block_k, warps, stages = 4, 512, 2, 3
    elif kind == PLAIN:
        block_n, block_k, warps, stages = (16, 256, 4, 1) if gated else (4, 1024 if width > 8192 else 2048, 4, 3)
    elif kind == NF4:
        block_n, block_k, warps, stages = 8, 512, 2, 2
    else:
        block_n, block_k, warps, stages = (8, 512, 2, 2) if gated else (8 if features > 4096 else 4, 2048, 4, 2)
    if kind == NF4:
        block_k = min(block_k, width & -width)  # divides the width
    return {"block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": stages}
