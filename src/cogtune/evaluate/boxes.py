"""How much boxes of answers overlap the right ones; `cogtune.data.boxes` finds them in texts."""

from __future__ import annotations

from collections.abc import Sequence

from cogtune.data.boxes import Box, find_boxes

__all__ = ["Box", "find_boxes", "matched_overlaps", "overlap"]


def overlap(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes, 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(one) + _area(other) - shared)


def matched_overlaps(given: Sequence[Box], right: Sequence[Box]) -> list[float]:
    """Match boxes one to one, the largest overlap first, and return the overlaps; a box without a partner has 0."""
    pairs = sorted(
        ((overlap(one, other), i, j) for i, one in enumerate(given) for j, other in enumerate(right)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    used: tuple[set[int], set[int]] = (set(), set())
    found = []
    for value, i, j in pairs:
        if i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
            found.append(value)
    return found + [0.0] * (max(len(given), len(right)) - len(found))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
