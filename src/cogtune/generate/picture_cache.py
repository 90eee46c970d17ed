"""Caches what was computed for pictures: the tower's features, and the KV cache of BOS and picture (the prefix).

The tower and the 2,306 positions of a picture cost far more than a question, and several questions usually concern one
picture. Entries are keyed by the picture's content; the least recently used are evicted when the budget is exceeded.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable

import torch
from PIL import Image

from cogtune.model.slots import Prefix
from cogtune.system.byte_sizes import GIB

_STRIP = 1 << 18  # pixels that are digested at once: memory for a whole photograph takes longer than its digest


def default_budget(device: torch.device, host: bool = False) -> int:
    """Return a quarter of what is free on a GPU now; 1 GiB elsewhere and in host memory."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" and not host else GIB


class PictureCache:
    """An LRU cache of tensors and prefixes within ``budget`` bytes, where they are or in host memory (``host``)."""

    def __init__(self, budget: int, host: bool = False) -> None:
        self.budget, self._host = budget, host
        self.hits = self.misses = 0
        self._entries: OrderedDict[Hashable, torch.Tensor | Prefix] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self._bytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> torch.Tensor | Prefix | None:
        """Return the entry of ``key`` and mark it as used."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: Hashable, entry: torch.Tensor | Prefix) -> None:
        """Add ``entry``, unless it alone is larger than the budget."""
        self.drop(key)
        if entry.nbytes > self.budget:
            return
        if self._host:
            entry = entry.cpu()
        self._entries[key] = entry
        self._bytes += entry.nbytes
        while self._bytes > self.budget:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.nbytes

    def drop(self, key: Hashable) -> None:
        """Remove an entry if it exists."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.nbytes

    def clear(self) -> None:
        """Remove everything, to free memory on the device."""
        self._entries.clear()
        self._bytes = 0


def image_digest(image: Image.Image | torch.Tensor) -> bytes:
    """Return a digest of an image's pixels, independent of the file."""
    if isinstance(image, torch.Tensor):
        return hashlib.sha256(image.contiguous().numpy().data).digest()
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    if image.palette is not None:
        digest.update(image.palette.tobytes())
    width, height = image.size
    rows = max(1, _STRIP // max(1, width))
    for top in range(0, height, rows):
        digest.update(image.crop((0, top, width, min(top + rows, height))).tobytes())
    return digest.digest()
