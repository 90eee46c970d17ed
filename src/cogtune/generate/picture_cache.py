"""What was computed of pictures, to be used again: the tower's features, and the keys and values of BOS and picture.

The tower and the picture's 2,306 positions cost far more than a question, and questions about one picture come in
turns, in a data set and from several users. Entries are found by the picture's content, and the least recently used go
first where the budget is spent.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable

import torch
from PIL import Image

from cogtune.model.slots import Prefix


class PictureCache:
    """Tensors and prefixes within ``budget`` bytes, the least recently used given up first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.hits = self.misses = 0
        self._entries: OrderedDict[Hashable, torch.Tensor | Prefix] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Memory of all entries."""
        return self._bytes

    def get(self, key: Hashable) -> torch.Tensor | Prefix | None:
        """What is kept under ``key``, which then counts as used."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: Hashable, entry: torch.Tensor | Prefix) -> None:
        """Keep ``entry``, unless it alone is larger than the budget."""
        self.drop(key)
        if entry.nbytes > self.budget:
            return
        self._entries[key] = entry
        self._bytes += entry.nbytes
        while self._bytes > self.budget:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.nbytes

    def drop(self, key: Hashable) -> None:
        """Forget one entry, if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.nbytes

    def clear(self) -> None:
        """Forget everything, to make room on the device."""
        self._entries.clear()
        self._bytes = 0


def image_digest(image: Image.Image) -> bytes:
    """A digest of an image's pixels: equal images have equal ones, wherever they were read from."""
    head = f"{image.mode} {image.size}".encode()
    palette = image.palette.tobytes() if image.palette is not None else b""
    return hashlib.blake2b(head + palette + image.tobytes(), digest_size=16).digest()
