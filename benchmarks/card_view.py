"""Which card is enough for what: `cogtune bench fit`'s file as the table for users."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.bench_views import caption
from benchmarks.views import Cell, markdown

CARDS = {
    "nf4-cached": ("12 GB", "lora-12gb.yaml"),
    "nf4-streamed": ("6 GB", "lora-6gb.yaml"),
    "bf16-streamed": ("12 GB", "lora-12gb-bf16.yaml"),
    "nf4-nf4-live": ("16 GB", None),
    "nf4-live": ("24 GB", None),
    "int8-cached": ("24 GB", None),
    "bf16-cached-recompute": ("32 GB", "lora-32gb.yaml"),
    "bf16-cached": ("48 GB", "lora-48gb.yaml"),
    "bf16-live-recompute": ("48 GB", None),
    "fill": ("12 GB", None),
    "inference-nf4": ("16 GB", None),
    "inference-bf16": ("48 GB", None),
}
"""A row of `bench fit`, without its rank -> the smallest usual card it is for, and the recipe nearest to it."""

_COLUMNS = ["card", "what is run", "rank", "peak, GiB", "samples/s", "flags"]
_COLUMNS_ZH = ["显卡", "运行内容", "rank", "峰值（GiB）", "样本/秒", "参数"]


def cards(content: dict[str, Any], chinese: bool) -> str:
    """Card, what was run, the peak that the allocator reserved, and how fast it was (``~``: by the plan, where several
    settings shared the card while their memory was measured); smallest card first."""
    rows = sorted(content["rows"], key=lambda row: (_gigabytes(row), row["name"]))
    table = markdown(_COLUMNS_ZH if chinese else _COLUMNS, [_row(row, chinese) for row in rows])
    return f"{table}\n\n{caption(content, chinese)}"


def _row(row: dict[str, Any], chinese: bool) -> list[Cell]:
    setting, rank = split_name(row["name"])
    card = CARDS[setting][0]
    flags = f"`{train_flags(row['command'])}`"
    if "error" in row:
        why = str(row["error"]).splitlines()[0][:80]
        return [card, setting, rank, f"失败：{why}" if chinese else f"failed: {why}", "-", flags]
    return [card, setting, rank, f"{row['peak_reserved_gib']:.2f}", _speed(row), flags]


def _speed(row: dict[str, Any]) -> str:
    if row.get("samples_per_second") is not None:
        return f"{row['samples_per_second']:.2f}"
    planned = (row.get("plan") or {}).get("median_ms")
    return "-" if planned is None else f"~ {1000 * row.get('batch_size', 1) / planned:.1f}"


def split_name(name: str) -> tuple[str, str]:
    """A row's setting and its adapter's rank: ``nf4-cached-r8`` -> ``nf4-cached``, ``8``."""
    found = re.fullmatch(r"(.+)-r(\d+)", name)
    return (found[1], found[2]) if found else (name, "-")


def _gigabytes(row: dict[str, Any]) -> int:
    return int(CARDS[split_name(row["name"])[0]][0].split()[0])


_BENCH_ONLY = re.compile(r" --(?:preset|steps|warmup|model\.path|cap|pictures|json) \S+")


def train_flags(command: str) -> str:
    """The flags of ``cogtune train`` that make the setting a ``cogtune bench`` command measured; ``-`` for none.

    What only measuring needs is left out, and a given tower's output is the filled feature cache it stands for."""
    command = re.sub(r"^cogtune bench (?:train|decode|fill)", "", command)
    command = command.replace(" --features cached", " --data.cache_features on")
    return _BENCH_ONLY.sub("", command).strip() or "-"
