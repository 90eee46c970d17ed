"""The committed drawings of results, by their kind: sweeps, and training curves of quantised weights."""

from __future__ import annotations

from typing import Any

from cogtune.evaluate.report.chart import Frame, Line, line_chart

_SWEPT = {
    "text": "text tokens",
    "batch": "rows of a batch",
    "questions": "questions on one picture",
    "rank": "LoRA rank",
}
_COLOURS = ("#000000", "#a51d2d", "#c64600", "#1a5fb4", "#26a269", "#813d9c", "#63452c")


def drawing_of(content: dict[str, Any]) -> str | None:
    """The drawing that belongs to a result file; None for one without."""
    if content.get("kind") == "quality":
        return _curves(content)
    return _sweep(content) if "series" in content.get("check", {}) else None


def _sweep(content: dict[str, Any]) -> str:
    """Milliseconds and allocated GiB of a step against a setting that grows."""
    rows = [(int(row["name"].rpartition("-")[2]), row) for row in content["rows"] if "error" not in row]
    swept = _SWEPT[content["check"]["series"]]
    frame = Frame(
        swept, 640, 300, left=62, right=62, top=34, bottom=44,
        title="milliseconds of a step (left), GiB allocated (right, dashed)",
        below=f"{swept}; {content['card'] or content['machine']}",
    )  # fmt: skip
    times, sizes = ([(x, float(row[key])) for x, row in rows] for key in ("median_ms", "allocated_gib"))
    return _file([
        Line("milliseconds", "", times, dots=True, colour="#1a5fb4"),
        Line("GiB", "", sizes, dots=True, colour="#a51d2d", dash="6 4", right=True),
    ], frame)  # fmt: skip


def _curves(content: dict[str, Any]) -> str:
    """Training loss as thin lines and validation loss as thicker ones with dots, of every row that has them."""
    frame = Frame(
        "Loss by optimiser step", 640, 340, left=50, right=110, top=30, bottom=40,
        title="loss: training (thin), validation (dots)", below="optimiser steps",
    )  # fmt: skip
    rows = [row for row in content["rows"] if "error" not in row]
    coloured = [(row, _COLOURS[number % len(_COLOURS)]) for number, row in enumerate(rows)]
    lines = [Line(row["name"], "", row["curves"]["validation"], dots=True, colour=colour, width=1.6)
             for row, colour in coloured]  # fmt: skip
    lines += [Line("", "", row["curves"]["train"], colour=colour, width=0.6) for row, colour in coloured]
    return _file(lines, frame, log=True, named=True)


def _file(lines: list[Line], frame: Frame, **options: bool) -> str:
    """On white, a mark a line."""
    text = line_chart(lines, frame, **options).replace("><", ">\n<")
    start = text.index("\n") + 1
    return f'{text[:start]}<rect width="{frame.width}" height="{frame.height}" fill="#fff"/>\n{text[start:]}\n'
