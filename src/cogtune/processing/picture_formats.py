"""The picture formats that checks, training, answers and the server open. Needs neither numpy nor torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from cogtune.language import tr

FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "QOI", "PCX",
)  # fmt: skip
"""Pillow formats that are opened, detected by content. Each is decoded in this process, and only when pixels are
needed. Of the others, EPS and WMF start external programs, and icons decode their content before any limit applies.
"""


@cache
def known_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this installation of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_header(source: Path | BinaryIO) -> Image.Image:
    """Open a picture in one of `FORMATS`: its header is read, its pixels are not.

    Raises:
        UnidentifiedImageError: none of the formats. ValueError: its header claims parts that no memory holds. For
            other broken headers Pillow's plugins raise nearly any exception.
    """
    try:
        return Image.open(source, formats=known_formats())
    except MemoryError as error:
        raise ValueError(tr("its header asks for more memory than there is")) from error


def unknown_picture(file: Path | bytes) -> str:
    """Describe a file that none of `FORMATS` opens: the format that its first bytes suggest."""
    if isinstance(file, bytes):
        start = file[:16]
    else:
        with file.open("rb") as stream:
            start = stream.read(16)
    Image.init()
    for name, (_, accept) in Image.OPEN.items():
        if name not in FORMATS and accept is not None and accept(start) is True:
            return tr("a picture in the format {name}, which is not opened here", name=name)
    return tr("not a picture of a known format")


def is_deep(image: Image.Image) -> bool:
    """Return whether a picture, opened or decoded, has more than 8 bits a channel that conversion to RGB would clip."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")
