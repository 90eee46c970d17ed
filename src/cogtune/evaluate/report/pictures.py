"""Small copies of pictures inside the page, each once, with boxes drawn over them; of a clip, frames side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from cogtune.errors import CogtuneError
from cogtune.evaluate.boxes import Box
from cogtune.processing.clip import decode, is_clip, read_clip
from cogtune.processing.frames import Sampling
from cogtune.processing.image import read_image

SIDE = 224
_QUALITY = 72
_CORNERS = 1000  # boxes are in thousandths of the picture
_STRIP = 4  # frames of a clip
_GAPS = 48  # a gap between frames is this part of their width
_TINY = 96  # pixels below which a picture is shown pixel by pixel


@dataclass(frozen=True)
class Small:
    """A small picture: its ``data:`` address, its size, and how many frames of a clip it shows side by side."""

    source: str
    width: int
    height: int
    frames: int = 1


@dataclass
class Pictures:
    """The pictures of a page. A card refers to one by its number, so that it is in the file once.

    Attributes:
        found: by path; None for one that cannot be read.
        size: bytes of all.
        exif: what is done with an EXIF orientation, as in `read_image`.
    """

    exif: str = "ignore"
    found: dict[str, Small | None] = field(default_factory=dict)
    size: int = 0

    def add(self, path: str) -> Small | None:
        """Return a picture, read at its first use."""
        if path not in self.found:
            small = self.found[path] = thumbnail(Path(path), self.exif)
            self.size += len(small.source) if small else 0
        return self.found[path]

    def drawn(self, path: str, label: str, boxes: Sequence[tuple[str, Sequence[Box]]] = ()) -> str:
        """Return a picture as SVG, with groups of boxes by CSS class; empty if it cannot be read."""
        small = self.add(path)
        if small is None:
            return ""
        if small.frames > 1:
            boxes = ()  # they are those of one picture
        sides = small.width / _CORNERS, small.height / _CORNERS
        rectangles = "".join(
            f'<rect class="{style}" x="{x0 * sides[0]:.1f}" y="{y0 * sides[1]:.1f}" width="{(x1 - x0) * sides[0]:.1f}"'
            f' height="{(y1 - y0) * sides[1]:.1f}"/>'
            for style, group in boxes
            for x0, y0, x1, y1 in group
        )
        number = list(self.found).index(path)
        tiny = " tiny" if max(small.width, small.height) <= _TINY else ""
        size = f'viewBox="0 0 {small.width} {small.height}" width="{small.width}" height="{small.height}"'
        opening = f'<svg class="picture{tiny}" {size} role="img" aria-label="{label}">'
        return f'{opening}<use href="#p{number}"/>{rectangles}</svg>'

    def is_film(self, path: str) -> bool:
        """Whether a picture that was added shows frames of a clip."""
        small = self.found.get(path)
        return small is not None and small.frames > 1

    def definitions(self) -> str:
        """Return the pictures themselves, which take no room on the page."""
        images = "".join(
            f'<image id="p{number}" href="{small.source}" width="{small.width}" height="{small.height}"/>'
            for number, small in enumerate(self.found.values())
            if small is not None
        )
        return f'<svg width="0" height="0" aria-hidden="true" class="store"><defs>{images}</defs></svg>'


def thumbnail(path: Path, exif: str = "ignore") -> Small | None:
    """Return a picture, at most `SIDE` pixels wide and high, or frames of a clip side by side; None without either."""
    try:
        frames = _frames(path, exif)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, CogtuneError):
        return None
    picture = _side_by_side(frames)
    tiny = max(picture.size) <= _TINY
    picture.thumbnail((SIDE * min(2, len(frames)), SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=tiny, quality=_QUALITY)
    return Small(
        f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", *picture.size, len(frames)
    )


def _frames(path: Path, exif: str) -> list[Image.Image]:
    """Return a picture, or a few frames of a clip or animation at even distances."""
    if is_clip(path):
        return [Image.fromarray(frame) for frame in decode(read_clip(path, Sampling("uniform", _STRIP)).frames)]
    with Image.open(path) as found:
        count = min(_STRIP, getattr(found, "n_frames", 1))
        if count == 1:
            return [read_image(path, exif=exif).convert("RGB")]
        frames = []
        for place in range(count):
            found.seek(place * getattr(found, "n_frames", 1) // count)
            frames.append(found.convert("RGB"))
        return frames


def _side_by_side(frames: Sequence[Image.Image]) -> Image.Image:
    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    gap = max(1, width // _GAPS)
    strip = Image.new("RGB", ((width + gap) * len(frames) - gap, height), "gray")
    for place, frame in enumerate(frames):
        strip.paste(frame, (place * (width + gap), 0))
    return strip
