"""The committed drawing of training curves: loss by step on a logarithmic axis, a colour a row, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 50, 110, 30, 40
COLOURS = ("#000000", "#a51d2d", "#c64600", "#1a5fb4", "#26a269", "#813d9c", "#63452c")
_MARKS = (1, 2, 5)

Points = Sequence[tuple[float, float]]


def curves(content: dict[str, Any]) -> str:
    """Training loss as thin lines and validation loss as thicker ones with dots, of every row that has them."""
    rows = [row for row in content["rows"] if "error" not in row]
    points = [point for row in rows for kind in ("train", "validation") for point in row["curves"][kind]]
    last, low = max(step for step, _ in points), min(loss for _, loss in points) * 0.9
    high = max(loss for _, loss in points) * 1.1

    def place(step: float, loss: float) -> tuple[float, float]:
        share = (math.log(loss) - math.log(low)) / (math.log(high) - math.log(low))
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11" role="img" aria-label="Loss by optimiser step">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18">loss: training (thin), validation (dots)</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">optimiser steps</text>',
    ]
    for value in _decades(low, high):
        y = place(0, value)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in range(0, int(last) + 1, 100):
        parts.append(f'<text x="{place(step, low)[0]:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{step}</text>')
    for number, row in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_line([place(*point) for point in row["curves"]["train"]], colour, 0.6))
        spots = [place(*point) for point in row["curves"]["validation"]]
        parts.append(_line(spots, colour, 1.6))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in spots]
        y = TOP + 14 * number + 10
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y}" fill="{colour}">{escape(row["name"])}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _line(spots: Points, colour: str, width: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="0.8"/>'


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = [mark * 10.0**decade for decade in range(first, last + 1) for mark in _MARKS]
    return [mark for mark in marks if low <= mark <= high]
