"""Boxes in texts, as grounding models of this family write them: ``[[x0,y0,x1,y1]]``, several joined by ``;``.

Coordinates are whole thousandths of the picture's width and height, three digits each, from the top left.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]
LARGEST = 999
"""The largest coordinate that three digits hold."""

GROUP = re.compile(r"\[\[([\d.,;\s]+)\]\]")


def find_boxes(text: str) -> list[Box]:
    """Return the boxes of a text in order; a group that is not four numbers, or has no area, is none."""
    return [box for group in GROUP.findall(text) for box in group_of(group) if box[0] < box[2] and box[1] < box[3]]


def group_of(inside: str) -> list[Box]:
    """Return the boxes between the brackets of a group, whatever their numbers; parts that are not four are left out.

    Numbers that are not finite are none.
    """
    found = []
    for part in inside.split(";"):
        try:
            numbers = [float(number) for number in part.split(",")]
        except ValueError:
            continue
        if len(numbers) == 4 and all(map(math.isfinite, numbers)):
            found.append((numbers[0], numbers[1], numbers[2], numbers[3]))
    return found


def box_text(boxes: Sequence[Box]) -> str:
    """Return boxes in thousandths as a model writes them."""
    return "[[" + ";".join(",".join(f"{round(value):03}" for value in box) for box in boxes) + "]]"
