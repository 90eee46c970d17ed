"""Quick check of a picture file: its header, and whether its end is there. Pixels are not decoded.

A header cannot show that a file was cut off. The last bytes of a complete JPEG, PNG or GIF can, so only files whose end
looks wrong (and formats without an end mark) are decoded here, and those that a `Decodes` chooses. Other damage is
found when training reads the file.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from cogtune.data.problems import BadRecordError
from cogtune.language import tr
from cogtune.processing.picture_formats import is_deep, open_header, unknown_picture
from cogtune.system.reading import open_file

ORIENTATION = 0x0112
"""EXIF's tag for how a picture is to be turned."""
# Formats whose header shows whether there is more than one frame.
_ANIMATED = ("GIF", "PNG", "WEBP")
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}
_TAIL = 64
_SAMPLE_FIRST, _SAMPLE_EVERY = 64, 50
_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """Result of a header check; ``size`` in bytes.

    ``turned``: EXIF asks for a rotation; ``animated``: more than one frame, of which only the first is used; ``deep``:
    more than 8 bits a channel; ``hdr``: a clip of high dynamic range.
    """

    size: int
    turned: bool = False
    animated: bool = False
    deep: bool = False
    hdr: bool = False


class Decodes:
    """Chooses the pictures that a check decodes: all, or the first of a data set and then a share of them.

    ``count``: how many it has chosen.
    """

    def __init__(self, *, full: bool) -> None:
        self._every = 1 if full else _SAMPLE_EVERY
        self._asked = itertools.count()
        self.count = 0

    def __call__(self) -> bool:
        number = next(self._asked)  # in one step, for threads
        chosen = number < _SAMPLE_FIRST or number % self._every == 0
        self.count += chosen
        return chosen


def check_picture(path: Path, max_pixels: int | None, decodes: Decodes | None = None) -> PictureHeader:
    """Check a picture's header and the end of its file, and its pixels if ``decodes`` chooses it.

    Raises:
        BadRecordError: ``image-empty``, ``image-unreadable``, ``image-too-large`` or ``image-truncated``.
    """
    try:
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                raise BadRecordError("image-empty", tr("the picture is empty (0 bytes)"))
            with open_header(stream) as image:
                width, height = image.size
                if max_pixels is not None and width * height > max_pixels:
                    raise BadRecordError(
                        "image-too-large",
                        tr(
                            "{width} x {height} pixels, more than data.max_pixels ({max_pixels})",
                            width=width,
                            height=height,
                            max_pixels=max_pixels,
                        ),
                    )
                form = image.format or ""
                animated = form in _ANIMATED and bool(getattr(image, "is_animated", False))
                header = PictureHeader(size, _is_turned(image), animated, is_deep(image))
                stream.seek(max(0, size - _TAIL))
                complete = form in _END_MARKS and _END_MARKS[form] in stream.read()
                if not complete or (decodes is not None and decodes()):
                    _decode(path)
    except UnidentifiedImageError as error:
        raise BadRecordError("image-unreadable", unknown_picture(path)) from error
    except Image.DecompressionBombError as error:
        raise BadRecordError("image-too-large", str(error)) from error
    except (BadRecordError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins answer broken headers with nearly any exception
        raise BadRecordError("image-unreadable", tr("the picture cannot be read ({error})", error=error)) from error
    return header


def turned_note(path: Path, exif: str) -> str | None:
    """What to say beside a picture that is shown: that its EXIF orientation is, or is not, followed; None: upright."""
    if not check_picture(path, None).turned:
        return None
    return tr("turned as its EXIF says") if exif == "apply" else tr("EXIF: data.exif apply would turn it")


def _is_turned(image: Image.Image) -> bool:
    """Return whether a viewer would rotate or mirror the picture, from the header alone."""
    if "exif" not in image.info and image.format != "TIFF":
        return False
    return image.getexif().get(ORIENTATION, 1) in range(2, 9)


def _decode(path: Path) -> None:
    try:
        with open_header(path) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # and so do its decoders
        raise BadRecordError("image-truncated", tr("the picture is incomplete ({error})", error=error)) from error


@contextmanager
def _headers_of_any_size() -> Iterator[None]:
    """Disable Pillow's pixel limit while headers are read: ``data.max_pixels`` is checked before decoding."""
    before = Image.MAX_IMAGE_PIXELS
    Image.init()
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], done: Callable[[int], None] | None = None
) -> list[Result]:
    """Return ``[work(item) for item in items]``, computed in a few threads: data sets are many small files.

    ``done`` is called after each item with the number of finished ones.
    """
    results = []
    with _headers_of_any_size(), ThreadPoolExecutor(_THREADS) as pool:
        for result in pool.map(work, items):
            results.append(result)
            if done is not None:
                done(len(results))
    return results
