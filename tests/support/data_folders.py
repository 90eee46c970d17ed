"""Small data sets on disk, in the published folder layout and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cogtune.configuration.run_config import DataSection


def section(*paths: Any, **values: Any) -> DataSection:
    """A data section reading ``paths`` (folders, files, or ``(path, weight)`` pairs)."""
    sources = [{"path": item[0], "weight": item[1]} if isinstance(item, tuple) else item for item in paths]
    return DataSection(path=sources, **values)


def dialogue(*texts: str) -> dict[str, Any]:
    """A record whose messages alternate user and assistant."""
    roles = ("user", "assistant")
    return {"conversations": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def write_image(path: Path, color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_label(path: Path, record: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return path


def write_folder(root: Path, records: Mapping[str, Any], *, labels: str = "labels", suffix: str = ".jpg") -> Path:
    """``root`` with one picture and one label file per stem of ``records``."""
    for number, (stem, record) in enumerate(records.items()):
        write_image(root / "images" / f"{stem}{suffix}", (number * 37 % 256, number * 59 % 256, 90))
        write_label(root / labels / f"{stem}.json", record)
    return root


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path
