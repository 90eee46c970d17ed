"""The first products x A' of low-rank updates in a decode step. Imported only with Triton.

They have so few features that tiles of them would not fill a GPU: a program has one feature of some rows, and all its
warps share the columns. A launch of its own takes longer than its work. So with a single row the product that needs
x A' computes it in its own launch (`announced`, `awaited`).

Shapes: R rows, I input features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cogtune.model.kernels.dependent_launch import waited


@triton.jit
def is_owned(n, adapters, each: tl.constexpr, stacked: tl.constexpr):
    """Return whether feature n of stacked first matrices belongs to a row's adapter. With two stacks that share their
    input, the second one follows the first."""
    return (n // each) % stacked == adapters


@triton.jit
def _columns(first, n, k, ins: tl.constexpr):
    return tl.load(first + n * ins + k, mask=k < ins, other=0.0).to(tl.float32)


@triton.jit
def _of_rows(x, norm, r, mine, k, ins: tl.constexpr, normed: tl.constexpr):
    """Return columns k of rows r, as `taken` does."""
    inside = k < ins
    plain = tl.load(x + (r * ins)[:, None] + k[None, :], mask=mine[:, None] & inside[None, :], other=0.0).to(tl.float32)
    values = plain
    if normed:
        values = plain * tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    return values, plain * plain


@triton.jit
def _feature(x, norm, first, weight, n, r, mine, eps, ins: tl.constexpr, normed: tl.constexpr, block_k: tl.constexpr):
    """Return feature n of x A' for rows r [rows] that are ``mine``. ``weight``: its first columns, loaded before."""
    k = tl.arange(0, block_k)
    values, squares = _of_rows(x, norm, r, mine, k, ins, normed)
    sums = values * weight[None, :]
    for k0 in tl.range(block_k, ins, block_k, loop_unroll_factor=1):
        values, more = _of_rows(x, norm, r, mine, k0 + k, ins, normed)
        squares += more
        sums += values * _columns(first, n, k0 + k, ins)[None, :]
    found = tl.sum(sums, 1)
    if normed:
        found *= tl.rsqrt(tl.sum(squares, 1) / ins + eps)
    return found


@triton.jit
def reduced(x, norm, first, out, adapters, rows, outs, eps, ins: tl.constexpr, each: tl.constexpr,
            stacked: tl.constexpr, normed: tl.constexpr, block_r: tl.constexpr, block_k: tl.constexpr,
            early: tl.constexpr):  # fmt: skip
    """One feature of x A' for some rows; see `decode.reduce`."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1).to(tl.int64) * block_r + tl.arange(0, block_r)
    mine = r < rows
    if stacked > 0:
        waited(early)
        mine = mine & is_owned(n, tl.load(adapters + r, mask=mine, other=-1), each, stacked)
        if tl.max(mine.to(tl.int32), 0) == 0:
            tl.store(out + r * outs + n, tl.zeros([block_r], out.dtype.element_ty), mask=r < rows)
            return
    weight = _columns(first, n, tl.arange(0, block_k), ins)
    if stacked == 0:
        waited(early)
    found = _feature(x, norm, first, weight, n, r, mine, eps, ins, normed, block_k)
    tl.store(out + r * outs + n, found.to(out.dtype.element_ty), mask=r < rows)


@triton.jit
def announced(x, norm, first, small, arrived, n, eps, ins: tl.constexpr, normed: tl.constexpr, block_k: tl.constexpr,
              early: tl.constexpr):  # fmt: skip
    """Compute feature n of x A' for the other programs of the launch, and count it."""
    weight = _columns(first, n, tl.arange(0, block_k), ins)
    waited(early)
    row = tl.arange(0, 1)
    found = _feature(x, norm, first, weight, n, row, row < 1, eps, ins, normed, block_k)
    tl.store(small + n + row, found.to(small.dtype.element_ty))
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def awaited(arrived, rank: tl.constexpr):
    """Wait until all features of x A' are there."""
    there = tl.atomic_add(arrived, 0, sem="acquire")
    while there < rank:
        there = tl.atomic_add(arrived, 0, sem="acquire")
