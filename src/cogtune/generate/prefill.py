"""Prefill of one request into its slot: the picture's part, which is kept for later requests, and its text.

Everything here runs in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image

from cogtune.errors import InputError
from cogtune.generate.picture_cache import PictureCache
from cogtune.generate.requests import Features, Request, Shown
from cogtune.generate.text_graphs import TextGraphs
from cogtune.language import tr
from cogtune.model.decode import prefill, prefill_hidden
from cogtune.model.head_offload import set_aside_head
from cogtune.model.routing import row_positions
from cogtune.model.slots import Prefix, SlotCache, SlotView
from cogtune.model.stacked_adapters import NONE, StackedAdapters
from cogtune.processing.image import normalise
from cogtune.processing.pixels import resized_of
from cogtune.processing.processor import CogVLM2Processor

_AT_ONCE = 24  # most images of one forward pass of the tower: a clip's
AHEAD = 3
"""Waiting requests whose images are resized while the device works."""


class Prefill:
    """Prefills slots with ``model``, and keeps what it computes of pictures in ``pictures``.

    Args:
        adapters: in place on ``model``; what is kept is kept for each.
    """

    def __init__(
        self,
        model: Any,
        processor: CogVLM2Processor,
        pictures: PictureCache,
        adapters: StackedAdapters | None,
    ) -> None:
        self._model, self._processor, self._pictures, self._adapters = model, processor, pictures, adapters
        self._resizing = ThreadPoolExecutor(1, "cogtune-pixels")
        self._resized: dict[bytes, Future[torch.Tensor]] = {}

    def prepare(self, waiting: Sequence[Request]) -> None:
        """Start resizing the images of the next requests, while the device works on others."""
        wanted = {
            key: image
            for request in waiting
            for key, image in zip(request.image_keys or (), request.images, strict=False)
            if ("features", key, NONE) not in self._pictures and not isinstance(image, Features)
        }
        self._resized = {
            key: self._resized.get(key) or self._resizing.submit(self._host_pixels, image)
            for key, image in list(wanted.items())[:_AT_ONCE]
        }

    def _host_pixels(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Return an image's pixels as they go to the device: uint8 [S, S, 3] of a picture, float32 [3, S, S] of a
        frame."""
        if isinstance(image, torch.Tensor) or self._processor.config.numbered_images:
            return self._processor.pixels(image)[0]
        return torch.from_numpy(resized_of(image, self._processor.image_size))

    def _pixels(self, key: bytes, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Return an image's pixels [3, S, S] on the model's device."""
        ahead = self._resized.pop(key, None)
        pixels = self._host_pixels(image) if ahead is None else ahead.result()
        pixels = pixels.to(self._model.device)
        return normalise(pixels) if pixels.dtype == torch.uint8 else pixels

    def adapter(self, name: str | None) -> int:
        """Return the index of an adapter by name.

        Raises:
            InputError: there is no such adapter.
        """
        names = () if self._adapters is None else self._adapters.names
        if name is not None and name not in names:
            there = tr(", ").join(names) if names else tr("none")
            raise InputError(
                tr("there is no adapter {name!r}; there are: {there}", name=name, there=there), code="adapter-unknown"
            )
        return NONE if self._adapters is None else self._adapters.index(name)

    def using(self, adapter: int) -> AbstractContextManager[None]:
        """Compute with one adapter."""
        return nullcontext() if self._adapters is None else self._adapters.using(adapter)

    def fill(
        self, request: Request, cache: SlotCache, slot: int, adapter: int, text: TextGraphs | None
    ) -> tuple[torch.Tensor, int, int]:
        """Prefill a slot with a prompt, copying the prefix of a known picture.

        Args:
            text: captured passes for what follows the picture; None: the model's forward pass.

        Returns:
            The logits behind the prompt, float32 [V], the next position, and the slot's length.
        """
        set_aside_head(self._model)  # of a model on a small card
        with self.using(adapter):
            ids = torch.tensor([request.encoded.input_ids])
            types = torch.tensor([request.encoded.token_type_ids])
            view = SlotView(cache, slot)
            start = 0
            if request.images:
                start = self._beginning(request, ids, types, cache, view, adapter)
            rest = slice(view.length, None)
            if text is None or text.rows_for(ids.shape[1] - view.length, view.length) is None:
                logits, position = prefill(self._model, view, ids[:, rest], types[:, rest], start=start)
                return logits, position, view.length
        words = ids[0, rest].tolist()
        logits = text.prefill(slot, words, start, view.length, adapter)
        return logits, start + len(words), view.length + len(words)

    def _beginning(
        self, request: Request, ids: torch.Tensor, types: torch.Tensor, cache: SlotCache, view: SlotView, adapter: int
    ) -> int:
        """Put a prompt's columns up to the end of its last image into a slot; returns the position behind them."""
        slot = view.slot
        assert request.image_keys is not None
        beginning = int(types[0].nonzero().max()) + 1  # up to the end of the last image
        words = tuple(ids[0, :beginning][types[0, :beginning] == 0].tolist())
        key = ("prefix", request.image_keys, words, adapter)
        kept = self._pictures.get(key)
        if isinstance(kept, Prefix):
            cache.put(slot, kept)
            view.advance(kept.columns)
        else:
            features = self.features(request.images, request.image_keys, adapter)
            prefill_hidden(self._model, view, ids[:, :beginning], types[:, :beginning], features)
            self._pictures.put(key, cache.copy_out(slot, beginning))
        return int(row_positions(types[:, :beginning], None).max()) + 1

    def features(self, images: Sequence[Shown], keys: Sequence[bytes], adapter: int) -> torch.Tensor | None:
        """Return the tower's output [N, grid * grid, width], or None without images."""
        if not images:
            return None
        tower = adapter if self._adapters is not None and self._adapters.changes_features(adapter) else NONE
        kept = {key: self._pictures.get(("features", key, tower)) for key in keys}
        new: dict[bytes, Image.Image | torch.Tensor] = {}
        for image, key in zip(images, keys, strict=True):
            if isinstance(image, Features):  # at most 8 MB: sent again rather than kept
                kept[key] = image.values[None].to(self._model.device, self._model.dtype, non_blocking=True)
            elif not isinstance(kept[key], torch.Tensor):
                new[key] = image
        for start in range(0, len(new), _AT_ONCE):
            some = list(new)[start : start + _AT_ONCE]
            pixels = torch.stack([self._pixels(key, new[key]) for key in some])
            for key, one in zip(some, self._model.model.encode_images(pixels), strict=True):
                kept[key] = one[None]
                self._pictures.put(("features", key, tower), one[None])
        there = {key: one.to(self._model.device) for key, one in kept.items() if isinstance(one, torch.Tensor)}
        return torch.cat([there[key] for key in keys])
