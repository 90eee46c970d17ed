"""What the README shows of the results: five rows of speed, the smallest setting for each card, and bars of both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from benchmarks.card_view import CARDS, split_name, train_flags
from benchmarks.views import Cell, markdown

_SPEED = {
    "baseline": (
        "published recipe: padded rows, experts by mask, every layer recomputed",
        "官方做法：补齐到最大长度、按掩码区分专家、每层重计算",
    ),
    "live": ("cogtune, vision tower in every step", "cogtune，每一步都运行视觉塔"),
    "cached": ("cogtune, features cached (`data.cache_features`)", "cogtune，使用缓存的特征（`data.cache_features`）"),
    "fp8-cached": (
        "the same, experts in fp8 (`quant.experts fp8`, `quant.fp8_layouts two`)",
        "同上，专家用 fp8（`quant.experts fp8`、`quant.fp8_layouts two`）",
    ),
    "vqa10": ("cached, ten short questions on one picture", "使用缓存的特征，一张图片十个短问题"),
}  # fmt: skip
"""Variants of ``speed-h100``, as a reader who has seen none of the others understands them."""

_SHOWN = ("nf4-cached-r16", "nf4-nf4-live-r16", "nf4-live-r16", "bf16-cached-recompute-r8", "bf16-live-recompute-r16")
"""Rows of ``fit-h100``, one for each card size: the largest that leaves room for CUDA's own memory on such cards."""


def speed(content: dict[str, Any], chinese: bool) -> str:
    """Samples and answers a second beside the published computation, of the same run on one card."""
    rows = {row["name"]: row for row in content["rows"]}
    base = rows["baseline"]
    cells = list[list[Cell]]()
    for name, words in _SPEED.items():
        row = rows[name]
        alike = row["preset"] == base["preset"]
        ratio = f"{row['samples_per_second'] / base['samples_per_second']:.1f}x" if alike else "-"
        cells.append([words[chinese], f"{row['samples_per_second']:.2f}", f"{row['answers_per_second']:.2f}", ratio,
                      f"{row['reserved_gib']:.1f}"])  # fmt: skip
    columns = (
        ["设置", "样本/秒", "回答/秒", "相对官方做法", "显存占用（PyTorch 保留，GiB）"]
        if chinese
        else ["setting", "samples/s", "answers/s", "against published", "memory reserved, GiB"]
    )
    return markdown(columns, cells)


def smallest(content: dict[str, Any], chinese: bool) -> str:
    """A setting for each card size, and the flags of ``cogtune train`` that make it where they are not its defaults."""
    rows = {row["name"]: row for row in content["rows"]}
    cells = list[list[Cell]]()
    for name in _SHOWN:
        row = rows[name]
        card, _ = CARDS[split_name(name)[0]]
        flags = re.sub(
            r" ?--(?:lora\.targets experts|lora\.rank 16|train\.compile false)", "", train_flags(row["command"])
        )
        cells.append([card, f"{row['peak_reserved_gib']:.1f}", f"`{flags.strip()}`"])
    columns = (
        ["显卡", "实测峰值（GiB）", "`cogtune train` 的参数"]
        if chinese
        else ["card", "measured peak, GiB", "flags of `cogtune train`"]
    )
    return markdown(columns, cells)


@dataclass(frozen=True)
class Bar:
    """A bar with its words at the left and its value behind it; ``ours`` decides the colour."""

    words: str
    value: float
    ours: bool


_INK, _THEIRS, _OURS = "#6e7781", "#9198a1", "#2da44e"
"""Grey and green that are legible on white and on black."""


def bars(speeds: dict[str, Any], fits: dict[str, Any], chinese: bool) -> str:
    """Speed at the left, memory at the right, each against the published computation, as SVG without a background."""
    steps = {row["name"]: row for row in speeds["rows"]}
    small = next(row for row in fits["rows"] if row["name"] == "nf4-cached-r8")
    words = (
        ("官方做法", "cogtune", "cogtune，缓存特征", "cogtune，4 比特", "训练速度（样本/秒）", "显存占用（GiB）")
        if chinese
        else ("published", "cogtune", "cogtune, cached", "cogtune, 4 bits", "training, samples a second",
              "GPU memory, GiB")
    )  # fmt: skip
    speed_bars = [Bar(words[place], steps[name]["samples_per_second"], place > 0)
                  for place, name in enumerate(("baseline", "live", "cached"))]  # fmt: skip
    memory_bars = [Bar(words[0], steps["baseline"]["reserved_gib"], False),
                   Bar(words[2], steps["cached"]["reserved_gib"], True),
                   Bar(words[3], small["peak_reserved_gib"], True)]  # fmt: skip
    left, right = _panel(words[4], speed_bars, 0, "{:.2f}"), _panel(words[5], memory_bars, 400, "{:.1f}")
    label = f"{words[4]}; {words[5]}"
    top = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 130" width="800" height="130" role="img"'
    return "\n".join([f'{top} font-family="sans-serif" font-size="13" aria-label="{escape(label)}">',
                      *left, *right, "</svg>\n"])  # fmt: skip


def _panel(title: str, shown: Sequence[Bar], left: int, form: str) -> list[str]:
    most = max(bar.value for bar in shown)
    parts = [f'<text x="{left + 4}" y="18" fill="{_INK}" font-weight="bold">{escape(title)}</text>']
    for row, bar in enumerate(shown):
        top, length = 32 + 32 * row, 185 * bar.value / most
        parts += [
            f'<text x="{left + 140}" y="{top + 16}" fill="{_INK}" text-anchor="end">{escape(bar.words)}</text>',
            f'<rect x="{left + 148}" y="{top}" width="{length:.1f}" height="22" rx="2" '
            f'fill="{_OURS if bar.ours else _THEIRS}"/>',
            f'<text x="{left + 154 + length:.1f}" y="{top + 16}" fill="{_INK}">{form.format(bar.value)}</text>',
        ]
    return parts
