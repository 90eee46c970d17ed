"""What `routing` refuses of a batch's masks and shapes."""

from __future__ import annotations

import numpy as np


def require_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ValueError where an input's shape is not that of ``input_ids``."""
    if tuple(found) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(found)}; input_ids has {tuple(expected)}")


def refuse_holes(mask: np.ndarray, lengths: np.ndarray) -> None:
    """Raise ValueError for padding inside a row; it may stand at either end. ``lengths``: of the rows, [B]."""
    width = mask.shape[1]
    first = mask.argmax(1)
    last = width - 1 - mask[:, ::-1].argmax(1)
    broken = np.flatnonzero((lengths > 0) & (last - first + 1 != lengths))
    if broken.size:
        raise ValueError(f"attention_mask has a hole inside row {int(broken[0])}; padding belongs at a row's ends")
