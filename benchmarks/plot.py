"""The committed drawings of the sweeps: time and memory of a step against a setting that grows, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 62, 62, 34, 44
_NAMES = {
    "text": "text tokens",
    "batch": "rows of a batch",
    "questions": "questions on one picture",
    "rank": "LoRA rank",
}


def plot(content: dict[str, Any]) -> str:
    """Milliseconds (solid, left axis) and allocated GiB (dashed, right axis) of a sweep's rows."""
    name = str(content["check"]["series"])
    rows = [(int(row["name"].rpartition("-")[2]), row) for row in content["rows"] if "error" not in row]
    last = max(value for value, _ in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11" role="img" aria-label="{escape(_NAMES[name])}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" fill="#1a5fb4">milliseconds of a step</text>',
        f'<text x="{WIDTH - RIGHT}" y="18" text-anchor="end" fill="#a51d2d">GiB allocated (dashed)</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(_NAMES[name])}; '
        f"{escape(str(content.get('card') or content['machine']))}</text>",
    ]
    for value in (tick for tick in _ticks(last) if tick <= last):
        parts.append(f'<text x="{_x(value, last):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{value:g}</text>')
    for key, colour, dash, side in (("median_ms", "#1a5fb4", "", 0), ("allocated_gib", "#a51d2d", "6 4", 1)):
        parts += _line([(value, float(row[key])) for value, row in rows], last, colour, dash, side)
    return "\n".join([*parts, "</svg>", ""])


def _line(points: Sequence[tuple[float, float]], last: float, colour: str, dash: str, side: int) -> list[str]:
    most = _ticks(max(value for _, value in points))[-1]
    parts = []
    for value in _ticks(most):
        y = _y(value, most)
        x, anchor = (LEFT - 6, "end") if side == 0 else (WIDTH - RIGHT + 6, "start")
        if side == 0:
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{y + 4:.1f}" text-anchor="{anchor}" fill="{colour}">{value:g}</text>')
    spots = [(_x(value, last), _y(height, most)) for value, height in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    parts.append(
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
    )
    return parts + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]


def _x(value: float, last: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value / last


def _y(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / most


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 up to the first at or above ``most``."""
    rough = max(most / 5, 1e-9)
    unit = 10.0 ** math.floor(math.log10(rough))
    stride = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    return [round(stride * index, 10) for index in range(math.ceil(most / stride) + 1)]
