"""What a measured row aims for, and whether it got there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """``ratio``: times the baseline's samples a second in the same run, which decides where there is a baseline;
    ``ms``: of a step, at most; ``near``: milliseconds to be within a tenth of; ``mfu``: share, at least; ``times``: of
    another row of the file, in this field, at least (or at most, for times of a step)."""

    text: str
    ratio: float | None = None
    ms: float | None = None
    near: float | None = None
    mfu: float | None = None
    times: tuple[float, str, str] | None = None


STEPS = {
    "baseline": Target("1,646 ms within 10 %", near=1646.0),
    "cached": Target("147 ms, 11.2x", ratio=11.2, ms=147.0),
    "live": Target("355 ms, 4.6x", ratio=4.6, ms=355.0),
    "cached-4": Target("LoRA-MFU 57 %", mfu=0.57),
    "fp8-cached": Target("105 ms, 15.7x", ratio=15.7, ms=105.0),
    "fp8-live": Target("275 ms, 6x", ratio=6.0, ms=275.0),
    "rank16": Target("1.15x of `cached`", times=(1.15, "median_ms", "cached")),
    "nf4-recompute": Target("300 ms", ms=300.0),
    "vqa10": Target("6x the answers of `vqa1`", times=(6.0, "answers_per_second", "vqa1")),
}
"""Variants of `cogtune bench train` on one H100, by name."""
PICTURES_PER_SECOND = {"none": 4.8, "fp8": 6.0}
"""Filling the feature cache on one H100, by the tower's number format."""
INFERENCE_GIB = {"none": 40.0, "nf4": 13.0}
"""A dialogue of 2,400 positions, by the number format of experts and tower."""


def per_sample(row: Row) -> float:
    """Milliseconds a sample."""
    return float(row["median_ms"]) / int(row["batch_size"])


def reached(row: Row, rows: Mapping[str, Row], target: Target) -> tuple[bool | None, str]:
    """Whether a row of a run got there (None: the row to compare with is missing), and what it is to be compared by."""
    baseline = rows.get("baseline")
    if target.ratio is not None:  # one card's milliseconds are not another's
        return (None if baseline is None else per_sample(baseline) / per_sample(row) >= target.ratio), ""
    if target.ms is not None:
        return row["median_ms"] <= target.ms, ""
    if target.near is not None:
        return abs(row["median_ms"] / target.near - 1) <= 0.1, ""
    if target.mfu is not None:
        return (None if row.get("lora_mfu") is None else row["lora_mfu"] >= target.mfu), ""
    if target.times is None or target.times[2] not in rows:
        return None, ""
    factor, field, other = target.times
    found = row[field] / rows[other][field]
    return (found <= factor if field == "median_ms" else found >= factor), f"{found:.2f}x"


def verdict(met: bool | None, text: str, chinese: bool, found: str = "") -> str:
    """A target's words with the outcome behind them."""
    if met is None:
        return text
    said = ("达到" if met else "未达到") if chinese else ("met" if met else "missed")
    return f"{text}{'：' if chinese else ': '}{found + (' ' if chinese else ', ') if found else ''}{said}"
