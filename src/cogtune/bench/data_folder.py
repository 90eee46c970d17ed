"""Small data sets in the published layout, ``images/`` and ``labels/``, for measurements and tests."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def dialogue(*texts: str) -> dict[str, Any]:
    """Return a record whose messages alternate between user and assistant."""
    roles = ("user", "assistant")
    return {"conversations": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def write_image(path: Path, color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (24, 16)) -> Path:
    """Write a picture of one colour, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_label(path: Path, record: Any) -> Path:
    """Write one record as a label file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return path


def write_letters(root: Path, count: int, question: int, answer: int) -> Path:
    """Fill ``root`` with ``count`` pictures, each with a question and an answer of that many random letters.

    They differ between records, so that another order gives other losses.
    """
    draw = random.Random(0)

    def letters(number: int) -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(number))

    return write_folder(root, {f"{i:05d}": dialogue(letters(question), letters(answer)) for i in range(count)})


def write_folder(
    root: Path,
    records: Mapping[str, Any],
    *,
    labels: str = "labels",
    suffix: str = ".jpg",
    size: tuple[int, int] = (24, 16),
) -> Path:
    """Fill ``root`` with one picture and one label file per stem of ``records``."""
    for number, (stem, record) in enumerate(records.items()):
        write_image(root / "images" / f"{stem}{suffix}", (number * 37 % 256, number * 59 % 256, 90), size)
        write_label(root / labels / f"{stem}.json", record)
    return root
