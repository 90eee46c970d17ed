"""Line charts as SVG, for the report (styled by its CSS) or as separate files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

_MARKS = (1, 2, 5)
_BOTTOM = 34
_LETTER = 10  # pixels of a figure in a label, at the size that small screens show

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A named line. ``style``: its CSS class, drawn before the others. ``dots``: mark its points.

    ``right``: its values have an axis of their own on the right.
    """

    name: str
    style: str
    points: Points
    dots: bool = False
    colour: str = "#000"
    width: float = 2.0
    dash: str = ""
    right: bool = False


@dataclass(frozen=True)
class Frame:
    """Size and margins in pixels, and the texts: a description (for screen readers), the title, and the x
    axis's label.
    """

    label: str
    width: int = 720
    height: int = 260
    left: int = 52
    right: int = 12
    top: int = 12
    bottom: int = _BOTTOM
    title: str = ""
    below: str = ""


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    marks: Sequence[float]
    log: bool

    def share(self, value: float) -> float:
        """Return the height of ``value``, 0 to 1. On a logarithmic axis, values below the end are drawn at the end."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)


def line_chart(lines: Sequence[Line], frame: Frame, *, log: bool = False, named: bool = False) -> str:
    """Draw lines over an x axis from 0; ``named``: with their names on the right."""
    last = max(x for line in lines for x, _ in line.points)
    axes = {side: _axis([y for line in lines if line.right == side for _, y in line.points], log)
            for side in {line.right for line in lines}}  # fmt: skip
    longest = max((len(f"{mark:g}") for mark in axes[False].marks), default=0) if False in axes else 0
    frame = replace(frame, left=max(frame.left, _LETTER * longest + 10))

    def x(value: float) -> float:
        return frame.left + (frame.width - frame.left - frame.right) * value / last

    def y(value: float, axis: _Axis) -> float:
        return frame.height - frame.bottom - (frame.height - frame.top - frame.bottom) * axis.share(value)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width} {frame.height}" role="img" '
             f'font-family="sans-serif" font-size="11" aria-label="{escape(frame.label)}">']  # fmt: skip
    for side, axis in sorted(axes.items()):
        at, anchor = (frame.width - frame.right + 6, "start") if side else (frame.left - 6, "end")
        for value in axis.marks:
            height = y(value, axis)
            if not side:
                ends = f'x1="{frame.left}" x2="{frame.width - frame.right}"'
                parts.append(f'<line class="grid" stroke="#ddd" {ends} y1="{height:.1f}" y2="{height:.1f}"/>')
            parts.append(f'<text x="{at}" y="{height + 4:.1f}" text-anchor="{anchor}">{value:g}</text>')
    under = frame.height - frame.bottom + 18
    for value in (mark for mark in _ticks(last) if mark <= last):
        parts.append(f'<text x="{x(value):.1f}" y="{under}" text-anchor="middle">{value:g}</text>')
    if frame.title:
        parts.append(f'<text x="{frame.left}" y="18">{escape(frame.title)}</text>')
    if frame.below:
        middle = (frame.left + frame.width - frame.right) / 2
        parts.append(f'<text x="{middle}" y="{frame.height - 8}" text-anchor="middle">{escape(frame.below)}</text>')
    for number, line in enumerate(lines):
        spots = [(x(at), y(value, axes[line.right])) for at, value in line.points]
        parts += _drawn(line, spots)
        if named:
            place = f'x="{frame.width - frame.right + 10}" y="{frame.top + 14 * number + 10}"'
            parts.append(f'<text {place} fill="{line.colour}">{escape(line.name)}</text>')
    return "".join([*parts, "</svg>"])


def _drawn(line: Line, spots: Points) -> list[str]:
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
    look = f'fill="none" stroke="{line.colour}" stroke-width="{line.width:g}"'
    look += f' stroke-dasharray="{line.dash}"' if line.dash else ""
    parts = [f'<polyline class="{line.style}" points="{path}" {look}><title>{escape(line.name)}</title></polyline>']
    if line.dots:
        dot = f'<circle class="{line.style}" fill="{line.colour}" r="3"'
        parts += [f'{dot} cx="{px:.1f}" cy="{py:.1f}"/>' for px, py in spots]
    return parts


def _axis(values: Sequence[float], log: bool) -> _Axis:
    if not log:
        marks = _ticks(max(values) if max(values) > 0 else 1.0)  # an axis of zeros alone ends at 1
        return _Axis(0.0, marks[-1], marks, log)
    low, high = min(value for value in values if value > 0), max(values) * 1.1
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = [mark * 10.0**decade for decade in range(first, last + 1) for mark in _MARKS]
    low = max(mark for mark in marks if mark <= low)
    return _Axis(low, high, [mark for mark in marks if low <= mark <= high], log)


def _ticks(most: float) -> list[float]:
    """Return round numbers from 0 to the first that is at least ``most``."""
    rough = max(most / 5, 1e-9)
    unit = 10.0 ** math.floor(math.log10(rough))
    stride = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    return [round(stride * index, 10) for index in range(math.ceil(most / stride) + 1)]
