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

from cogtune.model.kernels.dependent_launch import launch_options, waited
from cogtune.model.kernels.low_rank import reduced
from cogtune.model.kernels.vector import dense, gated_product, packed, split, taken

PLAIN, FP8, INT8, NF4 = 0, 1, 2, 3
MOST_ROWS, MOST_GATED_ROWS = 16, 64
"""Most rows of `linear` for which it is faster than library kernels (docs/log.md, 2026-11-30): of one product, and of
two that share their input."""
MOST_FEATURES = 65536
"""Most features of a row's product for `vector.dense`; of more, as a model's head has, `_few` reads them faster."""


LATE: dict[str, int] = {"early": False, "launch_pdl": False}
"""For a product that is slower if it starts before its input is there."""


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
def _few(x, w0, s0, w1, s1, out, residual, small0, second0, small1, second1, rows, outs, small_stride,
         ins: tl.constexpr, rank: tl.constexpr, each: tl.constexpr, kind: tl.constexpr, gated: tl.constexpr,
         adds: tl.constexpr, exact: tl.constexpr, block_r: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
         early: tl.constexpr):  # fmt: skip
    waited(early)
    n = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    r = tl.arange(0, block_r)
    inside = (n < outs)[None, :] & (r < rows)[:, None]
    at = tl.where(n < outs, n, 0)
    place = r.to(tl.int64)[:, None] * outs + n[None, :]
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
        found = gated_product(first, second, kept)
    if adds:
        found = found.to(kept).to(tl.float32) + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, found.to(kept), mask=inside)


@triton.jit
def _norm(x, weight, out, eps, width: tl.constexpr, block: tl.constexpr, early: tl.constexpr):
    waited(early)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, block)
    inside = d < width
    values, squares = taken(x + row * width, weight, d, inside, True)
    normed = values * tl.rsqrt(tl.sum(squares, 0) / width + eps)
    tl.store(out + row * width + d, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row(ids, table, out, width: tl.constexpr, block: tl.constexpr, early: tl.constexpr):
    waited(early)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, block)
    stored = tl.load(table + tl.load(ids + row) * width + d, mask=d < width, other=0.0)
    tl.store(out + row * width + d, stored, mask=d < width)


@triton.jit
def _gate(first, second, out, total, block: tl.constexpr, early: tl.constexpr):
    waited(early)
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < total
    gate = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    found = silu * tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


class Weight:
    """A frozen weight [O, I] as its layer stores it.

    Args:
        kind: `PLAIN`, `FP8` (uint8 bits), `INT8` or `NF4` (any 16 values of ``code``).
        data: [O, I], or for NF4 words of 8 codes, int32.
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
        self.code, self.words = (none, none) if code is None else (code, _lookup(code))
        self.outer = none if outer is None else outer
        self.table = none if table is None else table
        self.offset = none if offset is None else offset


def _lookup(code: torch.Tensor) -> torch.Tensor:
    """Return 16 values as `vector.packed` looks them up [9, 32]: float16's low bytes in 4 words, its high bytes in 4,
    and the selection that takes the first of two words. Every lane has a copy: values that a compiler knows to be the
    same for all lanes go to registers that byte permutations cannot read."""
    halves = code.to(torch.float16).view(torch.uint8).view(16, 2)
    words = halves.t().contiguous().view(torch.int32).flatten()
    return torch.cat([words, torch.full_like(words[:1], 0x32103210)])[:, None].repeat(1, 32)


Update = tuple[torch.Tensor, torch.Tensor]
"""x A' [R, rank] and s B [O, rank]; the rank is a power of two, at least 16, or n times one (`Stack`)."""


class Stack(NamedTuple):
    """Several adapters' matrices, concatenated: n of ``each`` ranks (a power of two, at least 16).

    Attributes:
        adapters: int64 [R], each row's adapter, -1 for none.
    """

    adapters: torch.Tensor
    n: int
    each: int


class Reduction(NamedTuple):
    """A [rank, I] of updates whose x A' the launch of the product computes itself, into the updates' tensor [1, rank].

    Attributes:
        arrived: int32 [1], 0 before the launch; counts the features of x A' that are there.
    """

    first: torch.Tensor
    arrived: torch.Tensor


def reduces(rows: int, weight: Weight) -> bool:
    """Return whether `linear` takes a `Reduction`: of one row, whose product leaves time for it, in `vector.dense`."""
    return rows == 1 and weight.kind != NF4 and weight.shape[0] <= MOST_FEATURES


def linear(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: Weight | None = None,
    residual: torch.Tensor | None = None,
    updates: tuple[Update, Update] | tuple[Update] | None = None,
    stack: Stack | None = None,
    reduction: Reduction | None = None,
    tiles: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Return ``x W'`` [R, O] of rows x [R, I], R at most 64; of a single row if the weight is NF4.

    Args:
        norm: weight [I] and epsilon of a root-mean-square norm applied to x before the product. For a single row, x
            times the norm's weight is multiplied, and the norm's scale is applied to the product.
        gated: a second weight G; the result is then silu(x W') * (x G').
        residual: [R, O], added to the result.
        updates: low-rank updates of ``weight`` and ``gated``.
        stack: the adapters that the ranks of ``updates`` belong to.
        reduction: with ``updates`` that share one x A', where `reduces` allows it.
        tiles: block_n, block_k and num_warps in place of this function's choice.
    """
    rows, (features, width) = x.shape[0], weight.shape
    other = weight if gated is None else gated
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    rank = 0 if updates is None else updates[0][0].shape[1]
    small0, second0 = (x, x) if updates is None else updates[0]
    small1, second1 = (small0, second0) if updates is None or len(updates) == 1 else updates[1]
    products = (
        weight.data, weight.scale, other.data, other.scale, out, x if residual is None else residual, small0, second0,
        small1, second1,
    )  # fmt: skip
    adapters = x if stack is None else stack.adapters
    options: dict[str, Any] = {
        "ins": width, "rank": rank, "each": rank if stack is None else stack.each, "gated": gated is not None,
        "adds": residual is not None, **launch_options(x),
    }  # fmt: skip
    if rows == 1 and (features <= MOST_FEATURES or weight.kind == NF4):
        tile = row_tiles(features, width, weight.kind, gated is not None) | (tiles or {})
        programs = triton.cdiv(features, tile["rows"] * tile["warps"])
        options |= {"num_warps": tile["warps"]} | tile
        before, eps = (x, 0.0) if norm is None else norm
        if weight.kind == NF4:
            halves = x.is_cuda and x.dtype != torch.float32
            code = weight.words if halves else weight.code
            stored = (code, weight.outer, other.outer, weight.table, weight.offset, other.offset)
            packed[(programs,)](
                _split(x, norm, halves), *products, adapters, *stored, features, per_outer=weight.per_outer,
                nested=weight.nested, halves=halves, **options,
            )  # fmt: skip
        else:
            first, arrived = (x, x) if reduction is None else reduction
            dense[(programs if reduction is None else programs + rank,)](
                x, before, *products, adapters, first, arrived, features, eps, kind=weight.kind,
                normed=norm is not None, reduces=reduction is not None, **options,
            )  # fmt: skip
        return out
    if norm is not None:
        x = root_mean_square_norm(x, *norm)
    tile = _tiles(rows, features, gated is not None) | (tiles or {})
    exact = "ieee" if x.dtype == torch.float32 else "tf32"
    block_r = max(16, triton.next_power_of_2(rows))
    _few[(triton.cdiv(features, tile["block_n"]),)](
        x, *products, rows, features, small0.stride(0), exact=exact, block_r=block_r, kind=weight.kind, **options,
        **tile,
    )  # fmt: skip
    return out


def reduce(
    x: torch.Tensor, first: torch.Tensor, *, norm: tuple[torch.Tensor, float] | None = None, stack: Stack | None = None
) -> torch.Tensor:
    """Return x A' [R, rank] of rows x [R, I], for the updates of `linear`.

    Args:
        first: A [rank, I]; with ``stack`` of all its adapters one behind the other, n times ``each`` ranks, or twice
            that for two layers that share their input. The result is 0 at ranks of adapters that are not the row's.
        norm: as for `linear`.
    """
    (rows, width), rank = x.shape, first.shape[0]
    out = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    before, eps = (x, 0.0) if norm is None else norm
    block_r = min(2, rows)
    reduced[(rank, triton.cdiv(rows, block_r))](
        x, before, first, out, x if stack is None else stack.adapters, rows, rank, eps, ins=width,
        each=rank if stack is None else stack.each, stacked=0 if stack is None else stack.n, normed=norm is not None,
        block_r=block_r, block_k=min(4096, triton.next_power_of_2(width)), num_warps=8, **launch_options(x),
    )  # fmt: skip
    return out


def _split(x: torch.Tensor, norm: tuple[torch.Tensor, float] | None, halves: bool) -> torch.Tensor:
    """Return a row [1, I] as NF4's product takes it; see `vector.split`."""
    weight, eps = (x, 0.0) if norm is None else norm
    width = x.shape[1]
    out = torch.empty(width, dtype=torch.int32 if halves else torch.float32, device=x.device)
    split[(1,)](
        x, weight, out, eps, width=width, normed=norm is not None, halves=halves,
        block=triton.next_power_of_2(width), num_warps=16, **launch_options(x),
    )  # fmt: skip
    return out


def root_mean_square_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the norm [R, I] of the rows of x [R, I] times ``weight`` [I], rounded once."""
    out, width = torch.empty_like(x), x.shape[1]
    block = triton.next_power_of_2(width)
    _norm[(x.shape[0],)](x, weight, out, eps, width=width, block=block, num_warps=8, **launch_options(x))
    return out


def embedding_rows(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return rows [R, D] of ``table`` [V, D] in page-locked host memory, read by the GPU itself: nothing waits."""
    rows, width = ids.shape[0], table.shape[1]
    out = torch.empty(rows, width, dtype=table.dtype, device=ids.device)
    _row[(rows,)](ids, table, out, width=width, block=triton.next_power_of_2(width), **launch_options(ids))
    return out


def silu_product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return silu(first) * second [R, O] of contiguous tensors, in one launch; silu is rounded as torch rounds it."""
    out, total = torch.empty_like(first), first.numel()
    _gate[(triton.cdiv(total, 2048),)](first, second, out, total, block=2048, num_warps=8, **launch_options(first))
    return out


def _tiles(rows: int, features: int, gated: bool) -> dict[str, int]:
    """Return the tile sizes that were fastest on an H200 for this model's shapes (docs/log.md, 2026-11-30)."""
    if rows > 16:
        block_n, block_k, warps, stages = (64, 64, 4, 4) if gated else (32, 128, 4, 4)
    else:
        block_n, block_k, warps, stages = (64, 128, 4, 4) if gated or features > MOST_FEATURES else (16, 256, 2, 4)
    return {"block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": stages}


def row_tiles(features: int, width: int, kind: int, gated: bool) -> dict[str, int]:
    """Like `_tiles`, for one row: features of a warp, warps, and the columns that it holds at a time."""
    if kind == NF4:
        return {"rows": 1, "warps": 8} | (LATE if width > 8192 else {})
    if kind == PLAIN:
        few = gated or width > 8192
        return {"rows": 1, "warps": 2 if few else 4, "block_k": 1024 if few else 512, "unroll": 1 if few else 2}
    if gated:
        return {"rows": 1, "warps": 4, "block_k": 4096, "unroll": 1}
    return {"rows": 2, "warps": 2, "block_k": 1024 if width > 8192 else 2048, "unroll": 1}
