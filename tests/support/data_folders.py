"""Small data sets on disk, in the published folder layout and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogtune.bench.data_folder import dialogue, write_folder, write_image, write_label
from cogtune.configuration.run_config import DataSection

__all__ = ["dialogue", "section", "write_folder", "write_image", "write_label", "write_lines"]


def section(*paths: Any, **values: Any) -> DataSection:
    """A data section reading ``paths`` (folders, files, or ``(path, weight)`` pairs)."""
    sources = [{"path": item[0], "weight": item[1]} if isinstance(item, tuple) else item for item in paths]
    return DataSection(path=sources, **values)


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path
