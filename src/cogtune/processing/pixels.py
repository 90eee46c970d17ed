"""Pictures as users give them, as pixels for the tower."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from cogtune.errors import DataError, InputError
from cogtune.language import tr
from cogtune.processing.frames import preprocess_frame
from cogtune.processing.image import normalise, read_image, resize, to_rgb

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


def pixels_of(image: Any, size: int, *, frame: bool = False) -> torch.Tensor:
    """Return the model's input for a PIL image or a picture's path: float32 ``[3, size, size]``, normalised.

    Args:
        frame: for a video model, whose pictures are frames of clips; it also takes a frame that is such a tensor.

    Raises:
        InputError: anything else.
        DataError: a file that cannot be read, or an address (code ``image-url``): nothing is fetched.
    """
    if frame and isinstance(image, torch.Tensor):
        if image.shape != (3, size, size):
            raise InputError(
                tr("an image has the shape {shape}, expected is 3 x {size} x {size}", shape=tuple(image.shape),
                   size=size)
            )  # fmt: skip
        return image
    return preprocess_frame(np.array(_opened(image)), size) if frame else normalise(resized_of(image, size))


def resized_of(image: Any, size: int) -> npt.NDArray[np.uint8]:
    """Return a picture, as `pixels_of` takes it, before it is normalised: uint8 ``[size, size, 3]``.

    Raises:
        InputError, DataError: as `pixels_of` does.
    """
    return resize(_opened(image), size)


def _opened(image: Any) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        if isinstance(path, str) and _ADDRESS.match(path):
            raise DataError(
                tr("{address}: addresses of pictures are not fetched", address=path[:80]),
                hint=tr("download the picture and give its path, or open it with PIL and give the image"),
                code="image-url",
            )
        return read_image(path)
    if isinstance(image, Image.Image):
        return to_rgb(image, getattr(image, "filename", "") or tr("the picture given"))
    raise InputError(
        tr("the picture is a {name}, not a PIL image or a path", name=type(image).__name__),
        hint=tr("for an array use PIL.Image.fromarray(array)"),
    )
