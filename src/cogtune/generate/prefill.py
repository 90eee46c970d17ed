"""Prefill of requests into their slots: the pictures' parts, which are kept for later requests, and their texts.

Everything here runs in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image

from cogtune.errors import InputError
from cogtune.generate.picture_cache import PictureCache
from cogtune.generate.requests import Features, Request, Resized, Shown
from cogtune.generate.text_graphs import Text, TextGraphs
from cogtune.language import tr
from cogtune.model.decode import prefill, prefill_hidden, prefill_pictures, prefill_texts
from cogtune.model.head_offload import set_aside_head
from cogtune.model.routing import row_positions
from cogtune.model.slots import Prefix, SlotCache, SlotView
from cogtune.model.stacked_adapters import NONE, StackedAdapters
from cogtune.processing.image import normalise
from cogtune.processing.pixels import resized_of
from cogtune.processing.processor import CogVLM2Processor

_AT_ONCE = 24  # most images of one forward pass of the tower: a clip's
_IMAGE_TOKENS_AT_ONCE = 2560  # most of several requests' new images: no more memory than for a full-size picture
_TEXT_AT_ONCE = 1024  # most tokens of several requests' texts, padding included: less than a full-size picture
AHEAD = 3
"""Waiting requests whose images are resized while the device works."""


Pixels = Image.Image | torch.Tensor | Resized


class Placed(NamedTuple):
    """A request in its slot, with the index of its adapter."""

    request: Request
    slot: int
    adapter: int


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
        self._images_at_once = min(_AT_ONCE, _IMAGE_TOKENS_AT_ONCE // model.config.num_image_tokens)
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
        with suppress(RuntimeError):  # no pool takes work once the main thread has ended; others may still ask
            self._resized = {
                key: self._resized.get(key) or self._resizing.submit(self._host_pixels, image)
                for key, image in list(wanted.items())[:_AT_ONCE]
            }

    def with_pixels(self, requests: Sequence[Request]) -> list[Request]:
        """Return requests whose new images are resized, to be computed here and on other ranks."""
        kept = Resized(torch.empty(0))
        new: dict[bytes, Features | Resized] = {}
        for request in requests:
            if _key(request) not in self._pictures:
                for key, image in zip(request.image_keys or (), request.images, strict=True):
                    if key not in new:
                        new[key] = image if isinstance(image, Features) else Resized(self._ahead(key, image))
        shown = [
            [kept if _key(one) in self._pictures else new[key] for key in one.image_keys or ()] for one in requests
        ]
        return [replace(one, images=tuple(images)) for one, images in zip(requests, shown, strict=True)]

    def _host_pixels(self, image: Pixels) -> torch.Tensor:
        """Return an image's pixels as they go to the device: uint8 [S, S, 3] of a picture, float32 [3, S, S] of a
        frame."""
        if isinstance(image, Resized):
            return image.values
        if isinstance(image, torch.Tensor) or self._processor.config.numbered_images:
            return self._processor.pixels(image)[0]
        return torch.from_numpy(resized_of(image, self._processor.image_size))

    def _ahead(self, key: bytes, image: Pixels) -> torch.Tensor:
        """Do as `_host_pixels`, for which `prepare` may have begun."""
        ahead = self._resized.pop(key, None)
        return self._host_pixels(image) if ahead is None else ahead.result()

    def _pixels(self, key: bytes, image: Pixels) -> torch.Tensor:
        """Return an image's pixels [3, S, S] on the model's device."""
        pixels = self._ahead(key, image).to(self._model.device)
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

    def together(self, waiting: Sequence[Request]) -> int:
        """Return how many of the first requests are prefilled at once, at least one: their texts, padded to the
        longest, and the images that are new have few enough tokens.
        """
        widest = images = 0
        new: set[Hashable] = set()
        for count, request in enumerate(waiting):
            widest = max(widest, len(request.text))
            key = _key(request)
            if key not in self._pictures and key not in new:
                new.add(key)
                images += len(request.images)
            many = images > self._images_at_once or (count + 1) * widest > _TEXT_AT_ONCE
            if many and count:
                return count
        return len(waiting)

    def fill(
        self, placed: Sequence[Placed], cache: SlotCache, graphs: TextGraphs | None
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Prefill slots with their prompts, copying the prefix of known pictures.

        Args:
            graphs: captured passes for what follows the picture; None: the model's forward pass.

        Returns:
            The logits after the prompts, float32 [R, V], and each one's next position and its slot's length.
        """
        set_aside_head(self._model)  # of a model on a small card
        found = self._beginnings(placed, cache)
        texts = [Text(one.slot, one.request.text, *found[one.slot], one.adapter) for one in placed]
        logits = [self._behind(some, cache, graphs) for some in ([texts] if graphs is None else graphs.groups(texts))]
        ends = [(text.position + len(text.tokens), text.length + len(text.tokens)) for text in texts]
        return logits[0] if len(logits) == 1 else torch.cat(logits), ends

    def _behind(self, texts: Sequence[Text], cache: SlotCache, graphs: TextGraphs | None) -> torch.Tensor:
        """Append texts in one pass; returns the logits after them [R, V]."""
        slots, tokens, positions, lengths, adapters = zip(*texts, strict=True)
        if graphs is not None and graphs.shape_for([len(some) for some in tokens]) is not None:
            return graphs.prefill(texts).clone()
        if len(texts) == 1:
            ids = torch.tensor(tokens)
            with self.using(adapters[0]):
                view = SlotView(cache, slots[0], lengths[0])
                return prefill(self._model, view, ids, torch.zeros_like(ids), start=positions[0])[0][None]
        with self._using_each(adapters, max(map(len, tokens))):
            hidden = prefill_texts(self._model, cache, slots, tokens, positions, lengths)
        with self._using_each(adapters, 1):
            found: torch.Tensor = self._model.lm_head(hidden).float()
            return found

    def _using_each(self, adapters: Sequence[int], tokens: int) -> AbstractContextManager[None]:
        """Compute rows of so many tokens each with its own adapter."""
        if self._adapters is None or len(set(adapters)) == 1:
            return self.using(adapters[0])
        of_rows = torch.tensor(adapters).to(self._model.device, non_blocking=True)
        return self._adapters.rows(of_rows.repeat_interleave(tokens))

    def _beginnings(self, placed: Sequence[Placed], cache: SlotCache) -> dict[int, tuple[int, int]]:
        """Put prompts' columns up to the end of their last images into the slots; returns the position after them and
        their number, by slot.
        """
        found = {one.slot: (0, 0) for one in placed}
        new: dict[Hashable, list[Placed]] = {}
        for one in placed:
            key = _key(one.request)
            kept = self._pictures.get(key) if one.request.images else None
            if isinstance(kept, Prefix):
                cache.put(one.slot, kept)
                found[one.slot] = kept.position, kept.columns
            elif one.request.images:
                new.setdefault(key, []).append(one)
        alike: dict[Hashable, list[Hashable]] = {}
        for key, (first, *_) in new.items():
            types = tuple(first.request.encoded.token_type_ids[: first.request.beginning])
            alike.setdefault((first.adapter, types), []).append(key)
        for keys in alike.values():
            firsts = [new[key][0] for key in keys]
            position = self._new_pictures(firsts, cache)
            for key, first in zip(keys, firsts, strict=True):
                prefix = cache.copy_out(first.slot, first.request.beginning, position)
                self._pictures.put(key, prefix)
                for one in new[key]:
                    found[one.slot] = position, prefix.columns
                for one in new[key][1:]:
                    kept = self._pictures.get(key)
                    cache.put(one.slot, kept if isinstance(kept, Prefix) else prefix)  # it may be too large to keep
        return found

    def _new_pictures(self, placed: Sequence[Placed], cache: SlotCache) -> int:
        """Compute the beginnings of prompts with images at the same places; returns the position after them."""
        requests, adapter = [one.request for one in placed], placed[0].adapter
        end = requests[0].beginning
        ids = torch.tensor([request.encoded.input_ids[:end] for request in requests])
        types = torch.tensor([request.encoded.token_type_ids[:end] for request in requests])
        images = [image for request in requests for image in request.images]
        with self.using(adapter):
            features = self.features(images, [key for one in requests for key in one.image_keys or ()], adapter)
            assert features is not None
            if len(placed) == 1:
                prefill_hidden(self._model, SlotView(cache, placed[0].slot), ids, types, features)
            else:
                prefill_pictures(self._model, cache, [one.slot for one in placed], ids, types, features)
        return int(row_positions(types[:1], None).max()) + 1

    def features(self, images: Sequence[Shown | Resized], keys: Sequence[bytes], adapter: int) -> torch.Tensor | None:
        """Return the tower's output [N, grid * grid, width], or None without images."""
        if not images:
            return None
        tower = adapter if self._adapters is not None and self._adapters.changes_features(adapter) else NONE
        kept = {key: self._pictures.get(("features", key, tower)) for key in keys}
        new: dict[bytes, Pixels] = {}
        for image, key in zip(images, keys, strict=True):
            if isinstance(image, Features):  # at most 8 MB: sent again rather than kept
                kept[key] = image.values[None].to(self._model.device, self._model.dtype, non_blocking=True)
            elif not isinstance(kept[key], torch.Tensor):
                new[key] = image
        for start in range(0, len(new), _AT_ONCE):
            some = list(new)[start : start + _AT_ONCE]
            pixels = torch.stack([self._pixels(key, new[key]) for key in some])
            for key, one in zip(some, self._model.model.encode_images(pixels).split(1), strict=True):
                own = one.clone() if len(some) > 1 else one  # a part would keep the whole in memory
                kept[key] = own
                self._pictures.put(("features", key, tower), own)
        there = {key: one.to(self._model.device) for key, one in kept.items() if isinstance(one, torch.Tensor)}
        return torch.cat([there[key] for key in keys])


def _key(request: Request) -> Hashable:
    """Return what a prompt's columns up to the end of its last image are kept under."""
    return ("prefix", request.image_keys, request.beginning_text, request.adapter)
