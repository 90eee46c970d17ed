"""Products of one row with weights in their storage format, for a decode step of one answer. Imported only with Triton.

Such a product is bandwidth-bound: every weight is read once. A program has a few output features; its warps hold whole
rows of a tile, so that sums stay in registers until the end. A program loads its first weights before it waits for its
input (`kernels.dependent_launch`).

Shapes: I input and O output features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cogtune.model.kernels.dependent_launch import waited
from cogtune.model.kernels.low_rank import announced, awaited


@triton.jit
def taken(x, weight, at, mask, normed: tl.constexpr):
    """Return inputs in float32, times the norm's weight if there is one, and the inputs' squares."""
    plain = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    values = plain
    if normed:
        values = plain * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    return values, plain * plain


@triton.jit
def _second(second, at, rank: tl.constexpr, each: tl.constexpr):
    """Return the rows [warps, rows, rank] of a single adapter's second matrix; of none or several, something unused."""
    found = at
    if rank > 0 and each == rank:
        found = tl.load(second + at[:, :, None] * rank + tl.arange(0, each)[None, None, :])
    return found


@triton.jit
def _added(found, small, update, second, adapters, at, rank: tl.constexpr, each: tl.constexpr):
    """Return a row's products plus its update, [warps, rows]. Of several adapters only the row's own is read."""
    if each == rank:
        found += tl.sum(update.to(tl.float32) * tl.load(small + tl.arange(0, each)).to(tl.float32)[None, None, :], 2)
    else:
        start = tl.load(adapters) * each
        if start >= 0:
            r = start + tl.arange(0, each)
            own = tl.load(second + at[:, :, None] * rank + r[None, None, :]).to(tl.float32)
            found += tl.sum(own * tl.load(small + r).to(tl.float32)[None, None, :], 2)
    return found


@triton.jit
def _features(program, outs, rows: tl.constexpr, warps: tl.constexpr):
    """Return a program's output features [warps, rows], and which of them exist.

    Triton gives the dimensions of a tile to threads in the order of their addresses' contiguity, ties from the first
    on. So the warps' dimension comes first.
    """
    first = program * rows * warps
    n = (first + tl.arange(0, warps)[:, None] * rows + tl.arange(0, rows)[None, :]).to(tl.int64)
    return n, n < outs


@triton.jit
def gated_product(gate, up, kept: tl.constexpr):
    """Return silu(gate) * up, each rounded to ``kept`` as its layer would."""
    gate = gate.to(kept).to(tl.float32)
    return (gate / (1 + tl.exp(-gate))).to(kept).to(tl.float32) * up.to(kept).to(tl.float32)


@triton.jit
def _finished(found, other, residual, small0, update0, second0, small1, update1, second1, adapters, at,
              rank: tl.constexpr, each: tl.constexpr, gated: tl.constexpr, adds: tl.constexpr,
              kept: tl.constexpr):  # fmt: skip
    """Return the results from the sums: with updates, gate and residual, as asked."""
    if rank > 0:
        found = _added(found, small0, update0, second0, adapters, at, rank, each)
        if gated:
            other = _added(other, small1, update1, second1, adapters, at, rank, each)
    if gated:
        found = gated_product(found, other, kept)
    if adds:
        found = found.to(kept).to(tl.float32) + tl.load(residual + at).to(tl.float32)
    return found


@triton.jit
def _stored(weight, at, k, ins: tl.constexpr, block_k: tl.constexpr):
    pointers = weight + (at * ins)[:, :, None] + k[None, None, :]
    if ins % block_k == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < ins)[None, None, :], other=0)


@triton.jit
def _wide(stored, kind: tl.constexpr):
    if kind == 1:
        stored = stored.to(tl.float8e4nv, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def _inputs(x, norm, k, ins: tl.constexpr, normed: tl.constexpr, warps: tl.constexpr):
    """Return inputs and their squares [warps, 1, block_k]: in the weights' layout, so warps exchange nothing."""
    at = k[None, None, :] + tl.zeros([warps, 1, 1], tl.int32)
    return taken(x, norm, at, at < ins, normed)


@triton.jit
def dense(x, norm, w0, s0, w1, s1, out, residual, small0, second0, small1, second1, adapters, reducing, arrived, outs,
          eps, ins: tl.constexpr, rank: tl.constexpr, each: tl.constexpr, kind: tl.constexpr, gated: tl.constexpr,
          adds: tl.constexpr, normed: tl.constexpr, reduces: tl.constexpr, rows: tl.constexpr, warps: tl.constexpr,
          block_k: tl.constexpr, unroll: tl.constexpr, early: tl.constexpr):  # fmt: skip
    """A row times a weight of 16 bits, fp8 or int8, or two of them; see `decode.linear`.

    With ``reduces`` the first ``rank`` programs compute x A', and the others wait for them after their own products.
    A GPU starts programs in the order of their numbers, so those that are waited for always run.
    """
    program = tl.program_id(0)
    if reduces:
        if program < rank:
            announced(x, norm, reducing, small0, arrived, program, eps, ins, normed, 256 * warps, early)
            return
        program -= rank
    n, inside = _features(program, outs, rows, warps)
    at = tl.where(inside, n, 0)
    k = tl.max_contiguous(tl.arange(0, block_k), 8)  # 8 values a thread, of 8 bits too: the layout of 8 inputs
    kept = out.dtype.element_ty
    first = _stored(w0, at, k, ins, block_k)
    second = first
    if gated:
        second = _stored(w1, at, k, ins, block_k)
    update0, update1 = _second(second0, at, rank, each), _second(second1, at, rank if gated else 0, each)
    waited(early)
    values, squares = _inputs(x, norm, k, ins, normed, warps)
    sums0 = _wide(first, kind) * values
    sums1 = sums0
    if gated:
        sums1 = _wide(second, kind) * values
    for k0 in tl.range(block_k, ins, block_k, loop_unroll_factor=unroll):
        first = _stored(w0, at, k0 + k, ins, block_k)
        if gated:
            second = _stored(w1, at, k0 + k, ins, block_k)
        values, more = _inputs(x, norm, k0 + k, ins, normed, warps)
        squares += more
        sums0 += _wide(first, kind) * values
        if gated:
            sums1 += _wide(second, kind) * values
    found = tl.sum(sums0, 2)
    other = found
    if gated:
        other = tl.sum(sums1, 2)
    if normed:
        scale = tl.rsqrt(tl.sum(squares, 2) / ins + eps)
        found *= scale
        other *= scale
    if kind == 1 or kind == 2:
        found *= tl.load(s0 + at)
        if gated:
            other *= tl.load(s1 + at)
    if reduces:
        awaited(arrived, rank)
    found = _finished(found, other, residual, small0, update0, second0, small1, update1, second1, adapters, at, rank,
                      each, gated, adds, kept)  # fmt: skip
    tl.store(out + n, found.to(kept), mask=inside)


@triton.jit
def split(x, norm, out, eps, width: tl.constexpr, normed: tl.constexpr, halves: tl.constexpr, block: tl.constexpr,
          early: tl.constexpr):  # fmt: skip
    """Prepare a row [I] for `packed`, normed.

    Words of 8 codes are multiplied with 8 values, and a byte's upper code comes first. In float32: 8 rows [I/8], one
    for each code of a word. As ``halves``: 4 rows [I/8] of pairs in float16, times a power of two that makes the
    largest of them at most 2, and after them the inverse of that power.
    """
    waited(early)
    if halves:
        t = tl.arange(0, block // 2)
        inside = 2 * t < width
        upper, squares = taken(x, norm, 2 * t, inside, normed)
        lower, more = taken(x, norm, 2 * t + 1, inside, normed)
        if normed:
            scale = tl.rsqrt(tl.sum(squares + more, 0) / width + eps)
            upper *= scale
            lower *= scale
        largest = tl.max(tl.maximum(tl.abs(upper), tl.abs(lower)), 0)
        power = largest.to(tl.int32, bitcast=True) & 0x7F800000
        inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)
        first = (lower * inverse).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        second = (upper * inverse).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        tl.store(out + (t % 4) * (width // 8) + t // 4, first | (second << 16), mask=inside)
        tl.store(out + width // 2, power)
    else:
        d = tl.arange(0, block)
        inside = d < width
        values, squares = taken(x, norm, d, inside, normed)
        if normed:
            values *= tl.rsqrt(tl.sum(squares, 0) / width + eps)
        tl.store(out + ((d % 8) ^ 1) * (width // 8) + d // 8, values, mask=inside)


@triton.jit
def _words(weight, absmax, outer, start, at, word, half, k0, whole: tl.constexpr, per_outer: tl.constexpr,
           nested: tl.constexpr):  # fmt: skip
    """Return words of 8 codes [32, warps, rows, 4] from word k0 of each row on, and what is stored of the scales of
    their blocks of 64 values [32, warps, rows]."""
    words = tl.load(weight + start + (k0 + word), mask=k0 + word < whole, other=0)
    each: tl.constexpr = whole // 8
    block = (at * each)[None, :, :] + tl.minimum((k0 + half * 4) // 8, each - 1)[:, None, None]
    scale = tl.load(absmax + block)
    of_outer = scale
    if nested:
        of_outer = tl.load(outer + block // per_outer)
    return words, scale, of_outer


@triton.jit
def _scale(stored, of_outer, table, offset, nested: tl.constexpr):
    """Return the scales of blocks from what is stored of them."""
    scale = stored
    if nested:
        scale = tl.load(table + stored.to(tl.int32)) * of_outer + tl.load(offset)
    return scale


_PRODUCTS: tl.constexpr = tl.constexpr("""{
.reg .b32 m, s, a, b, l, h, p, sum;
.reg .b16 c, d;
.reg .f32 e, f;
and.b32 m, $1, 0x77777777;
shr.u32 s, $1, 1;
lop3.b32 s, s, 0x44444444, $14, 0xEA;
prmt.b32 a, $6, $7, m;
prmt.b32 b, $8, $9, m;
prmt.b32 l, a, b, s;
prmt.b32 a, $10, $11, m;
prmt.b32 b, $12, $13, m;
prmt.b32 h, a, b, s;
prmt.b32 p, l, h, 0x5140;
mul.rn.f16x2 sum, p, $2;
prmt.b32 p, l, h, 0x7362;
fma.rn.f16x2 sum, p, $3, sum;
shr.u32 m, m, 16;
shr.u32 s, s, 16;
prmt.b32 a, $6, $7, m;
prmt.b32 b, $8, $9, m;
prmt.b32 l, a, b, s;
prmt.b32 a, $10, $11, m;
prmt.b32 b, $12, $13, m;
prmt.b32 h, a, b, s;
prmt.b32 p, l, h, 0x5140;
fma.rn.f16x2 sum, p, $4, sum;
prmt.b32 p, l, h, 0x7362;
fma.rn.f16x2 sum, p, $5, sum;
mov.b32 {c, d}, sum;
cvt.f32.f16 e, c;
cvt.f32.f16 f, d;
add.f32 $0, e, f;
}""")
"""Sum of a word's 8 products, 4 of each in float16. Values are looked up by byte permutations: no memory is read for
them. Low and high bytes of values 0 to 7 and 8 to 15 are selected by a code's lower three bits, and one of the two by
its upper bit."""


@triton.jit
def _halves(words, xs, at, there, whole: tl.constexpr, code, halves: tl.constexpr):
    """Return the sums of 32 products each, [32, warps, rows], of words of 8 codes [32, warps, rows, 4] with the part
    ``at`` [32, warps, 1, 4] of each row of xs."""
    x = xs + at
    x0, x1 = tl.load(x, mask=there, other=0), tl.load(x + whole, mask=there, other=0)
    x2, x3 = tl.load(x + 2 * whole, mask=there, other=0), tl.load(x + 3 * whole, mask=there, other=0)
    if halves:
        lane = code + tl.arange(0, 32)[:, None, None, None]
        found = tl.inline_asm_elementwise(
            _PRODUCTS, "=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [words, x0, x1, x2, x3, tl.load(lane), tl.load(lane + 32), tl.load(lane + 64), tl.load(lane + 96),
             tl.load(lane + 128), tl.load(lane + 160), tl.load(lane + 192), tl.load(lane + 224), tl.load(lane + 256)],
            dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    else:
        x4, x5 = tl.load(x + 4 * whole, mask=there, other=0), tl.load(x + 5 * whole, mask=there, other=0)
        x6, x7 = tl.load(x + 6 * whole, mask=there, other=0), tl.load(x + 7 * whole, mask=there, other=0)
        found = tl.load(code + (words & 15)) * x0 + tl.load(code + ((words >> 4) & 15)) * x1
        found += tl.load(code + ((words >> 8) & 15)) * x2 + tl.load(code + ((words >> 12) & 15)) * x3
        found += tl.load(code + ((words >> 16) & 15)) * x4 + tl.load(code + ((words >> 20) & 15)) * x5
        found += tl.load(code + ((words >> 24) & 15)) * x6 + tl.load(code + ((words >> 28) & 15)) * x7
    return tl.sum(found, 3)


@triton.jit
def packed(xs, w0, s0, w1, s1, out, residual, small0, second0, small1, second1, adapters, code, outer0, outer1, table,
           offset0, offset1, outs, ins: tl.constexpr, rank: tl.constexpr, each: tl.constexpr, gated: tl.constexpr,
           adds: tl.constexpr, per_outer: tl.constexpr, nested: tl.constexpr, rows: tl.constexpr, warps: tl.constexpr,
           halves: tl.constexpr, early: tl.constexpr):  # fmt: skip
    """A row, prepared by `split`, times a 4-bit weight of words of 8 codes, or two of them; see `decode.linear`.

    A thread has 4 adjacent words of each of its weight's rows: half a block with a scale of its own.
    """
    n, inside = _features(tl.program_id(0), outs, rows, warps)
    at = tl.where(inside, n, 0)
    kept = out.dtype.element_ty
    whole: tl.constexpr = ins // 8
    half = tl.arange(0, 32)
    word = (half[:, None] * 4 + tl.arange(0, 4)[None, :])[:, None, None, :] + tl.zeros([1, warps, 1, 1], tl.int32)
    start = (at * whole)[None, :, :, None]
    sums0 = tl.zeros([32, warps, rows], tl.float32)
    sums1 = tl.zeros([32, warps, rows], tl.float32)
    first, scale0, outer_scale0 = _words(w0, s0, outer0, start, at, word, half, 0, whole, per_outer, nested)
    second, scale1, outer_scale1 = first, scale0, outer_scale0
    if gated:
        second, scale1, outer_scale1 = _words(w1, s1, outer1, start, at, word, half, 0, whole, per_outer, nested)
    update0, update1 = _second(second0, at, rank, each), _second(second1, at, rank if gated else 0, each)
    waited(early)
    for k0 in range(0, whole, 128):
        words, own, of_outer = first, scale0, outer_scale0
        # the next ones are read while these are multiplied
        first, scale0, outer_scale0 = _words(w0, s0, outer0, start, at, word, half, k0 + 128, whole, per_outer, nested)
        there = k0 + word < whole
        sums0 += (_halves(words, xs, k0 + word, there, whole, code, halves)
                  * _scale(own, of_outer, table, offset0, nested))  # fmt: skip
        if gated:
            words, own, of_outer = second, scale1, outer_scale1
            second, scale1, outer_scale1 = _words(w1, s1, outer1, start, at, word, half, k0 + 128, whole, per_outer,
                                                  nested)  # fmt: skip
            sums1 += (_halves(words, xs, k0 + word, there, whole, code, halves)
                      * _scale(own, of_outer, table, offset1, nested))  # fmt: skip
    found = tl.sum(sums0, 0)
    other = found
    if gated:
        other = tl.sum(sums1, 0)
    if halves:
        power = tl.load(xs + ins // 2).to(tl.float32, bitcast=True)
        found *= power
        other *= power
    found = _finished(found, other, residual, small0, update0, second0, small1, update1, second1, adapters, at, rank,
                      each, gated, adds, kept)  # fmt: skip
    tl.store(out + n, found.to(kept), mask=inside)
