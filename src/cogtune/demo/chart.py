"""A line chart as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34
_DECADE_MARKS = (1, 2, 5)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A named line; ``style`` is its CSS class. With ``dots`` its points are marked."""

    name: str
    style: str
    points: Points
    dots: bool = False


def loss_chart(lines: Sequence[Line]) -> str:
    """Loss over steps on a logarithmic axis; lines without points are left out."""
    lines = [line for line in lines if line.points]
    values = [value for line in lines for _, value in line.points if value > 0]
    last = max(step for line in lines for step, _ in line.points)
    low, high = _bounds(min(values)), max(values) * 1.1

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / last

    def y(value: float) -> float:
        share = (math.log(max(value, low)) - math.log(low)) / (math.log(high) - math.log(low))
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss over optimiser steps">']
    for value in _marks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in _steps(last):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{step}</text>')
    for line in lines:
        spots = [(x(step), y(value)) for step, value in line.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
        parts.append(f'<polyline class="{line.style}" points="{path}"><title>{escape(line.name)}</title></polyline>')
        if line.dots:
            parts += [f'<circle class="{line.style}" cx="{px:.1f}" cy="{py:.1f}" r="4"/>' for px, py in spots]
    parts.append("</svg>")
    legend = "".join(f'<span><i class="{line.style}"></i>{escape(line.name)}</span>' for line in lines)
    return f'{"".join(parts)}<p class="legend">{legend}</p>'


def _bounds(value: float) -> float:
    """The nearest mark of a logarithmic axis at or below ``value``."""
    decade = 10.0 ** math.floor(math.log10(value))
    return max(mark * decade for mark in _DECADE_MARKS if mark * decade <= value)


def _marks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = [mark * 10.0**decade for decade in range(first, last + 1) for mark in _DECADE_MARKS]
    return [mark for mark in marks if low <= mark <= high]


def _steps(last: float) -> list[int]:
    """About six round step numbers from 0."""
    rough = max(last / 6, 1)
    unit = 10 ** math.floor(math.log10(rough))
    stride = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return list(range(0, int(last) + 1, int(stride)))
