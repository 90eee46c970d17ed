"""Tiny clips that tests write with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")


def shade(index: int) -> int:
    """The grey of frame ``index``: neighbours differ by far more than a codec's error."""
    return (37 * index) % 200 + 20


def write_clip(
    path: Path,
    frames: int = 24,
    *,
    rate: Fraction | int = 8,
    size: tuple[int, int] = (48, 32),
    codec: str = "libx264",
    start: float = 0.0,
    times: Sequence[float] | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    transfer: int | None = None,
) -> Path:
    """Write a clip of grey frames (width, height = ``size``), each of `shade`'s brightness. ``transfer``: FFmpeg's
    number of the transfer function that the file claims."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        base = Fraction(1, 1000)
        stream.codec_context.time_base = base
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        for index in range(frames):
            picture = np.full((size[1], size[0], 3), shade(index), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            at = float(index / Fraction(rate)) if times is None else times[index]
            frame.time_base, frame.pts = base, round((start + at) * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
