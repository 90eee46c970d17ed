"""The picture half of the processor as an image processor of transformers' kind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.processing.image import MEAN, STD
from cogtune.processing.pixels import pixels_of

_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}


class CogVLM2ImageProcessor(BaseImageProcessor):
    """Resize to a square, scale and normalise, as `cogtune.processing.image.preprocess` does.

    Example:
        >>> processor.image_processor(["a.jpg", "b.jpg"], return_tensors="pt")["pixel_values"].shape

    ``size``, ``image_mean`` and the other attributes say what is done; the model was trained with these values, so
    they do not change.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (the base class's own declaration style)

    def __init__(self, size: dict[str, int], frames: bool = False, **stored: Any) -> None:
        """Take ``size`` {"height": S, "width": S}; ``frames``: preprocess as the video models do.

        Other values come from a file that `save_pretrained` wrote.
        """
        self.frames = frames
        super().__init__(
            size=size, resample=3, rescale_factor=1 / 255, image_mean=list(MEAN), image_std=list(STD), **_FIXED
        )

    def preprocess(self, images: Any, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """Return ``pixel_values`` float32 [N, 3, S, S] of one picture or a list, each a PIL image or a path.

        Without ``return_tensors`` they are a list of arrays [3, S, S].

        Raises:
            InputError: something else than pictures, or another way of preprocessing.
            DataError: a file that cannot be read, or an address: nothing is fetched.
        """
        changed = [name for name, value in options.items() if value is not None and value != getattr(self, name, None)]
        if changed:
            raise InputError(
                tr("the pictures' preprocessing is fixed: {options} cannot be set", options=", ".join(changed)),
                hint=tr("leave it out; the model was trained with one way of preprocessing"),
            )
        shown = list(images) if isinstance(images, (list, tuple)) else [images]
        pixels = torch.stack([pixels_of(image, self.size["height"], frame=self.frames) for image in shown])
        if return_tensors is None:
            return BatchFeature({"pixel_values": list(pixels.numpy())})
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
