"""The tiny model and questions that all tests of answering share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.checkpoint.load import load_model
from cogtune.generate.generator import Ask
from cogtune.processing.processor import CogVLM2Processor


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path) -> tuple[Any, CogVLM2Processor]:
    """The model and its processor."""
    return load_model(tiny_checkpoint), CogVLM2Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def red() -> Image.Image:
    return Image.new("RGB", (10, 7), (220, 10, 10))


@pytest.fixture(scope="module")
def asks(red: Image.Image) -> list[Ask]:
    """Questions with and without a picture and a history; the first and the last are about the same picture."""
    blue = Image.new("RGB", (8, 8), (10, 10, 220))
    return [
        (red, "What colour?", []),
        (None, "Hello there, how are you doing today?", [("Hi", "Hello")]),
        (blue, "And this one?", [("What colour?", "Red."), ("Sure?", "Yes, quite sure.")]),
        (red, "Why?", []),
    ]
