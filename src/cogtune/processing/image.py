"""Reading picture files in the formats of `picture_formats`, and the published preprocessing, bit for bit.

torch is imported only when a tensor is made, so commands that check data can read pictures without it.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.processing.picture_formats import is_deep, known_formats, open_header, unknown_picture

if TYPE_CHECKING:
    import torch

# The statistics CLIP was trained with, per RGB channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

PREPROCESSING = 1
"""Increased whenever preprocessing gives other numbers for a picture, which invalidates cached features."""

_HEADER_LOCK = threading.Lock()
_URL = re.compile(r"(?:https?|ftp|file|s3|gs|oss):/", re.IGNORECASE)


def read_image(
    path: str | Path, *, max_pixels: int | None = None, exif: str = "ignore", bit_depth: str = "clip"
) -> Image.Image:
    """Decode a picture to RGB as the published code does: ``convert("RGB")``, EXIF orientation not applied.

    With ``exif`` "apply" the picture is turned as its EXIF orientation says. ``bit_depth`` concerns pictures with more
    than 8 bits a channel (`is_deep`): "clip" makes values above 255 white, as the published code does; "scale" makes
    the lowest value black and the highest white.

    The format is told by content, not by suffix. A picture of more than ``max_pixels`` pixels is refused from its
    header, before anything is decoded; None is Pillow's own limit (178,956,970).

    Raises:
        DataError: codes ``image-missing``, ``image-empty``, ``image-too-large``, ``image-unreadable`` (not a picture)
            and ``image-truncated`` (cut off or damaged).
    """
    path = Path(path)
    if _URL.match(str(path)):
        raise DataError(
            tr("{path}: a web address or URL; a file was expected", path=path),
            hint=tr("download the picture, and give the file's path"),
            code="image-url",
        )
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, a folder without permission, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            tr("{path}: the picture cannot be read ({error})", path=str(path)[:200], error=reason),
            hint=tr("check the path"),
            code="image-unreadable",
        ) from error
    if not there:
        raise DataError(tr("{path}: no such picture", path=path), hint=tr("check the path"), code="image-missing")
    if path.stat().st_size == 0:
        raise DataError(
            tr("{path}: the picture is empty (0 bytes)", path=path),
            hint=tr("copy or download it again"),
            code="image-empty",
        )
    with _open_header(path, max_pixels) as image:
        return to_rgb(image, str(path), exif=exif, bit_depth=bit_depth)


def to_rgb(image: Image.Image, where: str, *, exif: str = "ignore", bit_depth: str = "clip") -> Image.Image:
    """Decode an opened picture to mode RGB; ``where`` names it in errors.

    Raises:
        DataError: ``image-truncated``.
    """
    try:
        image.load()
        if exif == "apply":
            image = ImageOps.exif_transpose(image)
        if bit_depth == "scale" and is_deep(image):
            image = _scaled(image)
        # a picture without a file behind it is not copied
        return image if image.mode == "RGB" and type(image) is Image.Image else image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly any exception for damaged data
        raise DataError(
            tr("{where}: the picture is incomplete or damaged ({error})", where=where, error=error),
            hint=tr("copy or download it again, or remove it together with its label"),
            code="image-truncated",
        ) from error


def _scaled(image: Image.Image) -> Image.Image:
    """Return the picture in 8 bits: its lowest value 0, its highest 255; values that are not finite count as lowest."""
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return Image.fromarray(np.zeros(values.shape, np.uint8))
    low, high = values[finite].min(), values[finite].max()
    with np.errstate(all="ignore"):
        shares = (np.where(finite, values, low) - low) / max(high - low, np.finfo(np.float64).tiny)
    return Image.fromarray(np.rint(255 * shares).astype(np.uint8))


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """Return the model's input for one picture: float32 ``[3, size, size]``, normalised.

    Resizes to a square without regard to the aspect ratio: bicubic and antialiased, on 8-bit RGB, before scaling to [0,
    1]. Bit-equal to torchvision's Resize on a PIL image, ToTensor and Normalize.
    """
    return normalise(resize(image, size))


def resize(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """Resize, the first half of `preprocess`: uint8 ``[size, size, 3]``. The second half depends on nothing else."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image)


def normalise(resized: npt.NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """Normalise, the second half of `preprocess`: float32 ``[3, size, size]`` from uint8 ``[size, size, 3]``.

    A tensor is normalised on its device.
    """
    import torch

    whole = resized if isinstance(resized, torch.Tensor) else torch.from_numpy(resized)
    pixels = whole.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=whole.device).view(3, 1, 1) for values in (MEAN, STD))
    return pixels.div_(255).sub_(mean).div_(std)


def _open_header(path: Path, max_pixels: int | None) -> Image.Image:
    """Read only the header, and refuse pictures with too many pixels."""
    try:
        image = _open_any_size(path) if max_pixels is not None else open_header(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, str(error)) from error
    except UnidentifiedImageError as error:
        raise DataError(
            tr("{where}: {what}", where=path, what=unknown_picture(path)),
            hint=tr(
                "check the file, or convert it to one of {known_formats}", known_formats=", ".join(known_formats())
            ),
            code="image-unreadable",
        ) from error
    except Exception as error:  # Pillow's plugins answer broken headers with nearly any exception
        raise DataError(
            tr("{path}: the picture cannot be read ({error})", path=path, error=error),
            hint=tr("check the file's permissions, or copy or download it again"),
            code="image-unreadable",
        ) from error
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        image.close()
        raise _too_large(
            path,
            tr(
                "{width} x {height} pixels, the limit is {max_pixels}",
                width=width,
                height=height,
                max_pixels=max_pixels,
            ),
        )
    return image


def _open_any_size(path: Path) -> Image.Image:
    """Open without Pillow's own pixel limit, which would override a higher ``max_pixels``."""
    with _HEADER_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return open_header(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _too_large(path: Path, found: str) -> DataError:
    return DataError(
        tr("{path}: the picture is too large ({found})", path=path, found=found),
        hint=tr("make the picture smaller, or raise data.max_pixels if you trust where it comes from"),
        code="image-too-large",
    )
