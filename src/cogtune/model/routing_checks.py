"""Checks of a batch's routing inputs: shapes, masks with holes, segments that form no tree."""

from __future__ import annotations

import numpy as np

from cogtune.configuration.shapes import TREE_ROOT, UNUSED_PARENT


def require_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ValueError unless an input has the shape of ``input_ids``."""
    if tuple(found) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(found)}; input_ids has {tuple(expected)}")


def refuse_holes(mask: np.ndarray, lengths: np.ndarray) -> None:
    """Raise ValueError for padding inside a row; it may only be at either end. ``lengths``: real tokens per row,
    [B]."""
    width = mask.shape[1]
    first = mask.argmax(1)
    last = width - 1 - mask[:, ::-1].argmax(1)
    broken = np.flatnonzero((lengths > 0) & (last - first + 1 != lengths))
    if broken.size:
        raise ValueError(f"attention_mask has a hole inside row {int(broken[0])}; padding belongs at a row's ends")


def require_parents(parents: np.ndarray, counts: np.ndarray) -> None:
    """Raise ValueError unless parents [B, segments] precede their children, with -1 for roots and -2 for unused
    entries.

    ``counts``: segments per row, [B].
    """
    number = np.arange(parents.shape[1])[None]
    if (counts > parents.shape[1]).any():
        row = int(np.argmax(counts > parents.shape[1]))
        raise ValueError(f"row {row} has {int(counts[row])} segments; segment_parents has {parents.shape[1]} entries")
    used = number < counts[:, None]
    if (used & ((parents < TREE_ROOT) | (parents >= number))).any():
        raise ValueError("every segment's parent must be -1 or an earlier segment of its row")
    if (~used & (parents != UNUSED_PARENT)).any():
        raise ValueError("segment_parents must be -2 beyond a row's last segment")
