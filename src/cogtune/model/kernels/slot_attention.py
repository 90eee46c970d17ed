"""The attention of a decode step over slots, for GPUs with Triton. Imported only there.

One launch rotates the newest token's heads, writes its keys and values and attends to parts of a row's columns; a
second one combines the parts. Only columns that a slot holds are read. Where several rows are adjacent tokens of one
slot, a launch before these writes all their keys and values, which the later ones of them see.

Shapes: R rows, S slots, C columns, H query and K key/value heads, E head width, P parts of a row's columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cogtune.model.kernels.dependent_launch import launch_options, waited

PART = 256  # columns per attention program; fixed, so that a row's result does not depend on the number of rows
NARROWEST_HEAD = 32  # tl.dot multiplies halves of a head, and needs 16 columns


@triton.jit
def _written(k_at, turn_cos, turn_sin, keys, values, place, groups: tl.constexpr, width: tl.constexpr):
    """Rotate a new key, write it and its value at ``place``, and return the key's halves and the value."""
    half: tl.constexpr = width // 2
    d = tl.arange(0, half)
    e = tl.arange(0, width)
    k0 = tl.load(k_at + d).to(tl.float32)
    k1 = tl.load(k_at + half + d).to(tl.float32)
    new0 = (k0 * turn_cos - k1 * turn_sin).to(keys.dtype.element_ty)
    new1 = (k0 * turn_sin + k1 * turn_cos).to(keys.dtype.element_ty)
    value = tl.load(k_at + groups * width + e)
    tl.store(keys + place + d, new0)
    tl.store(keys + place + half + d, new1)
    tl.store(values + place + e, value)
    return new0, new1, value


@triton.jit
def _write(qkv, cos, sin, keys, values, slots, lengths, row_stride, slot_stride, head_stride, num_slots,
           heads: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, early: tl.constexpr):  # fmt: skip
    waited(early)
    row, group = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= num_slots:
        return
    half: tl.constexpr = width // 2
    d = tl.arange(0, half)
    turn_cos = tl.load(cos + row * half + d).to(tl.float32)
    turn_sin = tl.load(sin + row * half + d).to(tl.float32)
    place = slot * slot_stride + group.to(tl.int64) * head_stride + tl.load(lengths + row).to(tl.int64) * width
    k_at = qkv + row.to(tl.int64) * row_stride + (heads + group) * width
    _written(k_at, turn_cos, turn_sin, keys, values, place, groups, width)


@triton.jit
def _attend(qkv, cos, sin, keys, values, slots, lengths, context, largest, total, scale, row_stride, slot_stride,
            head_stride, num_slots, parts, heads: tl.constexpr, groups: tl.constexpr, width: tl.constexpr,
            part: tl.constexpr, block: tl.constexpr, exact: tl.constexpr, written: tl.constexpr,
            early: tl.constexpr):  # fmt: skip
    waited(early)
    row, group, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= num_slots:
        return
    length = tl.load(lengths + row).to(tl.int32)
    start = number * part
    if start > length:
        return
    half: tl.constexpr = width // 2
    each: tl.constexpr = heads // groups
    d = tl.arange(0, half)
    g = tl.arange(0, 16)
    mine = g < each
    turn_cos = tl.load(cos + row * half + d).to(tl.float32)
    turn_sin = tl.load(sin + row * half + d).to(tl.float32)
    dtype = keys.dtype.element_ty
    q_at = qkv + row.to(tl.int64) * row_stride + (group * each + g)[:, None] * width + d[None, :]
    q0 = tl.load(q_at, mask=mine[:, None], other=0.0).to(tl.float32)
    q1 = tl.load(q_at + half, mask=mine[:, None], other=0.0).to(tl.float32)
    first = (q0 * turn_cos[None, :] - q1 * turn_sin[None, :]).to(dtype)
    second = (q0 * turn_sin[None, :] + q1 * turn_cos[None, :]).to(dtype)
    base = slot * slot_stride + group.to(tl.int64) * head_stride
    e = tl.arange(0, width)
    most = tl.full([16], -float("inf"), tl.float32)
    sums = tl.zeros([16], tl.float32)
    found = tl.zeros([16, width], tl.float32)
    for column in range(0, part, block):
        at = start + column + tl.arange(0, block)
        there = at < length + written
        k_at = keys + base + at.to(tl.int64)[:, None] * width + d[None, :]
        k0 = tl.load(k_at, mask=there[:, None], other=0.0)
        k1 = tl.load(k_at + half, mask=there[:, None], other=0.0)
        scores = tl.dot(first, tl.trans(k0), input_precision=exact)
        scores = tl.dot(second, tl.trans(k1), scores, input_precision=exact) * scale
        scores = tl.where(there[None, :], scores, -float("inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(larger == -float("inf"), 0.0, larger)  # no column yet: every exponential is 0, not NaN
        shrink = tl.exp(most - safe)
        weights = tl.exp(scores - safe[:, None])
        v = tl.load(values + base + at.to(tl.int64)[:, None] * width + e[None, :], mask=there[:, None], other=0.0)
        found = found * shrink[:, None] + tl.dot(weights.to(dtype), v, input_precision=exact)
        sums = sums * shrink + tl.sum(weights, 1)
        most = larger
    # the newest column, if nobody has: the program whose part contains it rotates and writes it
    if (written == 0) & (length < start + part):
        k_at = qkv + row.to(tl.int64) * row_stride + (heads + group) * width
        place = base + length.to(tl.int64) * width
        new0, new1, v_new = _written(k_at, turn_cos, turn_sin, keys, values, place, groups, width)
        score = tl.sum(first.to(tl.float32) * new0.to(tl.float32)[None, :], 1)
        score = (score + tl.sum(second.to(tl.float32) * new1.to(tl.float32)[None, :], 1)) * scale
        larger = tl.maximum(most, score)
        shrink, weight = tl.exp(most - larger), tl.exp(score - larger)
        found = found * shrink[:, None] + weight[:, None] * v_new.to(tl.float32)[None, :]
        sums = sums * shrink + weight
        most = larger
    head = (row * heads + group * each + g).to(tl.int64) * parts + number
    tl.store(largest + head, most, mask=mine)
    tl.store(total + head, sums, mask=mine)
    tl.store(context + head[:, None] * width + e[None, :], found, mask=mine[:, None])


@triton.jit
def _combine(context, largest, total, slots, lengths, out, num_slots, parts, heads: tl.constexpr, width: tl.constexpr,
             part: tl.constexpr, most_parts: tl.constexpr, early: tl.constexpr):  # fmt: skip
    waited(early)
    row, head = tl.program_id(0), tl.program_id(1)
    if tl.load(slots + row) >= num_slots:
        return
    used = tl.load(lengths + row).to(tl.int32) // part + 1
    p = tl.arange(0, most_parts)
    e = tl.arange(0, width)
    start = (row * heads + head).to(tl.int64) * parts
    most = tl.load(largest + start + p, mask=p < used, other=-float("inf"))
    share = tl.exp(most - tl.max(most, 0))
    sums = tl.sum(share * tl.load(total + start + p, mask=p < used, other=0.0), 0)
    found = tl.load(context + (start + p)[:, None] * width + e[None, :], mask=(p < used)[:, None], other=0.0)
    mean = tl.sum(found * share[:, None], 0) / sums
    tl.store(out + (row * heads + head).to(tl.int64) * width + e, mean.to(out.dtype.element_ty))


def slot_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    heads: int,
    *,
    adjacent: bool = False,
) -> torch.Tensor:
    """Rotate the newest token's heads, write its keys and values into the slots, and attend to all of them.

    Args:
        qkv: [R, (H + 2K) * E].
        cos, sin: [R, E/2], of the newest tokens' positions.
        keys, values: one layer's [S, K, C, E]; column ``lengths`` of each row's slot is written.
        slots: [R]; a row whose slot is S or more is skipped, and its result is undefined.
        lengths: [R], number of columns filled before each row's token.
        adjacent: the rows are consecutive tokens of one slot; each sees those before it.

    Returns:
        The context [R, H * E]. Only filled columns of a slot are read.
    """
    rows = qkv.shape[0]
    num_slots, groups, columns, width = keys.shape
    parts = triton.cdiv(columns, PART)
    context = torch.empty(rows * heads * parts, width, dtype=torch.float32, device=qkv.device)
    largest = torch.empty(rows * heads * parts, dtype=torch.float32, device=qkv.device)
    total = torch.empty_like(largest)
    out = torch.empty(rows, heads * width, dtype=qkv.dtype, device=qkv.device)
    launch = launch_options(qkv)
    exact = "ieee" if qkv.dtype == torch.float32 else "tf32"
    if adjacent:
        _write[(rows, groups)](
            qkv, cos, sin, keys, values, slots, lengths, qkv.stride(0), keys.stride(0), keys.stride(1), num_slots,
            heads=heads, groups=groups, width=width, num_warps=1, **launch,
        )  # fmt: skip
    _attend[(rows, groups, parts)](
        qkv, cos, sin, keys, values, slots, lengths, context, largest, total, width**-0.5, qkv.stride(0),
        keys.stride(0), keys.stride(1), num_slots, parts, heads=heads, groups=groups, width=width, part=PART,
        block=64 if qkv.dtype == torch.float32 else 128, exact=exact, written=int(adjacent), num_warps=4,
        num_stages=3 if rows == 1 else 2, **launch,
    )  # fmt: skip
    _combine[(rows, heads)](
        context, largest, total, slots, lengths, out, num_slots, parts, heads=heads, width=width, part=PART,
        most_parts=triton.next_power_of_2(parts), num_warps=4, **launch,
    )  # fmt: skip
    return out
