"""Images of an example as the vision tower takes them: pictures made square, or a clip's frames cropped.

Shapes: S the side of the tower's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import TYPE_CHECKING

from PIL import Image

from cogtune.data.records import ImageRef
from cogtune.processing.clip import decode
from cogtune.processing.frames import Frame, crop_of, preprocess_frame
from cogtune.processing.image import preprocess, read_image

if TYPE_CHECKING:
    import torch


def reader_pool(threads: int, start: Callable[[], object] | None = None) -> ThreadPoolExecutor:
    """Return threads that read images side by side; each calls ``start`` first.

    torch divides an operation among as many threads as there are cores. Readers on all cores would each do that, and
    their helpers, spinning while they wait, would take the cores from each other and from whoever feeds the device. So
    a reader computes alone; other threads keep their number.
    """
    return ThreadPoolExecutor(threads, "cogtune-decode", _begin_reading, (start,))


_BEGINNING = Lock()


def _begin_reading(start: Callable[[], object] | None) -> None:
    import torch

    with _BEGINNING:
        others = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of those that begin from now on
        restore = Thread(target=torch.set_num_threads, args=(others,))  # which ends this for the latter
        restore.start()
        restore.join()
    if start is not None:
        start()


def tower_inputs(
    images: Sequence[ImageRef],
    size: int,
    *,
    max_pixels: int | None = None,
    exif: str = "ignore",
    bit_depth: str = "clip",
) -> Iterator[torch.Tensor]:
    """Yield float32 [3, S, S] for each image; a clip is decoded once, and one frame of it is in memory at a time.

    Raises:
        DataError: a file that cannot be read or decoded.
    """
    frames = [image for image in images if isinstance(image, Frame)]
    if frames:
        yield from (preprocess_frame(frame, size) for frame in decode(frames))
        return
    for image in images:
        assert not isinstance(image, Frame)
        yield preprocess(read_image(image, max_pixels=max_pixels, exif=exif, bit_depth=bit_depth), size)


def shown_squares(
    images: Sequence[ImageRef], side: int, *, exif: str = "ignore", bit_depth: str = "clip"
) -> Iterator[tuple[Image.Image, str]]:
    """Yield for people what the model sees: a square of ``side`` pixels, and the size of the original."""
    frames = [image for image in images if isinstance(image, Frame)]
    for pixels in decode(frames):
        height, width, top, left = crop_of(pixels.shape[0], pixels.shape[1], side)
        scaled = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        yield scaled.crop((left, top, left + side, top + side)), f"{pixels.shape[1]} x {pixels.shape[0]}"
    for image in images:
        if not isinstance(image, Frame):
            picture = read_image(image, exif=exif, bit_depth=bit_depth)
            square = picture.resize((side, side), Image.Resampling.BICUBIC)
            yield square, f"{picture.width} x {picture.height}"
