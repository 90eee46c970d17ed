"""Prefill of one request into its slot: the picture's part, which is kept for later requests, and its text.

Everything here runs in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cogtune.errors import InputError
from cogtune.generate.picture_cache import PictureCache
from cogtune.generate.requests import Request, Shown
from cogtune.language import tr
from cogtune.model.decode import prefill
from cogtune.model.routing import row_positions
from cogtune.model.slots import Prefix, SlotCache, SlotView
from cogtune.model.stacked_adapters import NONE, StackedAdapters
from cogtune.processing.processor import CogVLM2Processor

_AT_ONCE = 24  # most images of one forward pass of the tower: a clip's


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

    def fill(self, request: Request, cache: SlotCache, slot: int, adapter: int) -> tuple[torch.Tensor, int, int]:
        """Prefill a slot with a prompt, copying the prefix of a known picture.

        Returns:
            The logits behind the prompt, float32 [V], the next position, and the slot's length.
        """
        with self.using(adapter):
            return self._fill(request, cache, slot, adapter)

    def _fill(self, request: Request, cache: SlotCache, slot: int, adapter: int) -> tuple[torch.Tensor, int, int]:
        ids = torch.tensor([request.encoded.input_ids])
        types = torch.tensor([request.encoded.token_type_ids])
        view = SlotView(cache, slot)
        if not request.images:
            logits, position = prefill(self._model, view, ids, types)
            return logits, position, view.length
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
            prefill(self._model, view, ids[:, :beginning], types[:, :beginning], features)
            self._pictures.put(key, cache.copy_out(slot, beginning))
        start = int(row_positions(types[:, :beginning], None).max()) + 1
        logits, position = prefill(self._model, view, ids[:, beginning:], types[:, beginning:], start=start)
        return logits, position, view.length

    def features(self, images: Sequence[Shown], keys: Sequence[bytes], adapter: int) -> torch.Tensor | None:
        """Return the tower's output [N, grid * grid, width], or None without images."""
        if not images:
            return None
        tower = adapter if self._adapters is not None and self._adapters.changes_features(adapter) else NONE
        kept = {key: self._pictures.get(("features", key, tower)) for key in keys}
        new = {key: image for image, key in zip(images, keys, strict=True) if not isinstance(kept[key], torch.Tensor)}
        for start in range(0, len(new), _AT_ONCE):
            some = list(new)[start : start + _AT_ONCE]
            pixels = torch.cat([self._processor.pixels(new[key]) for key in some])
            for key, one in zip(some, self._model.model.encode_images(pixels.to(self._model.device)), strict=True):
                kept[key] = one[None]
                self._pictures.put(("features", key, tower), one[None])
        return torch.cat([kept[key] for key in keys])  # type: ignore[misc]
