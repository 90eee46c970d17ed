"""The committed drawings of results: sweeps."""

from __future__ import annotations

from typing import Any

from cogtune.evaluate.report.chart import Frame, Line, line_chart

_SWEPT = {
    "text": "text tokens",
    "batch": "rows of a batch",
    "questions": "questions on one picture",
    "rank": "LoRA rank",
}


def drawing_of(content: dict[str, Any]) -> str | None:
    """The drawing that belongs to a result file; None for one without."""
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


def _file(lines: list[Line], frame: Frame) -> str:
    """On white, a mark a line."""
    text = line_chart(lines, frame).replace("><", ">\n<")
    start = text.index("\n") + 1
    return f'{text[:start]}<rect width="{frame.width}" height="{frame.height}" fill="#fff"/>\n{text[start:]}\n'
