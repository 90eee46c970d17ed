"""Key/value cache for many conversations at once: one slot each, all of one length, allocated once.

Shapes: N layers, S slots, C columns of a slot, K key/value heads, E head width, L new columns.

Prefill fills a slot through a `SlotView`, or several through `SlotRows`: the cache objects that the model's forward
pass writes to. Then each decode step adds one column (``model.decode``). Columns beyond a slot's length hold stale
values that attention never reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogtune.configuration.model import CogVLM2Config


class SlotCache:
    """Key/value cache for ``slots`` sequences of at most ``columns`` tokens.

    Args:
        config: layers, heads and head width.
        dtype, device: of the keys and values.
        heads: K of a model that shares its heads with other ranks; None: all of them.

    Attributes:
        keys, values: [N, S, K, C, E].
    """

    def __init__(
        self,
        config: CogVLM2Config,
        slots: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device | str,
        heads: int | None = None,
    ) -> None:
        if slots < 1 or columns < 1:
            raise ValueError(f"{slots} slots of {columns} columns; both have to be at least 1")
        heads = config.num_multi_query_heads if heads is None else heads
        shape = (config.num_hidden_layers, slots, heads, columns, config.head_dim)
        # zeros, not empty: masked columns are multiplied by a probability of 0, and 0 times NaN is NaN
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @classmethod
    def of(cls, model: Any, slots: int, columns: int) -> SlotCache:
        """Return a cache for ``model``, of those heads that are on this rank."""
        heads = model.model.layers[0].self_attn.num_kv_heads
        return cls(model.config, slots, columns, model.dtype, model.device, heads)

    @property
    def slots(self) -> int:
        """Number of sequences that fit."""
        return int(self.keys.shape[1])

    @property
    def columns(self) -> int:
        """Number of tokens that fit in a slot."""
        return int(self.keys.shape[3])

    @staticmethod
    def bytes_per_column(config: CogVLM2Config, dtype: torch.dtype) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        return 2 * config.num_hidden_layers * config.num_multi_query_heads * config.head_dim * dtype.itemsize

    def resized(self, slots: int, columns: int) -> SlotCache:
        """Return a larger cache whose beginning is a copy of this one."""
        found = SlotCache.__new__(SlotCache)
        layers, before, heads, length, width = self.keys.shape
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(layers, slots, heads, columns, width)
            new[:, :before, :, :length] = old
            setattr(found, name, new)
        return found

    def copy_out(self, slot: int, columns: int, position: int = 0) -> Prefix:
        """Return a copy of a slot's first columns. ``position``: the one after them."""
        return Prefix(self.keys[:, slot, :, :columns].clone(), self.values[:, slot, :, :columns].clone(), position)

    def put(self, slot: int, prefix: Prefix) -> None:
        """Begin a slot with a kept prefix.

        Raises:
            ValueError: it is longer than a slot.
        """
        if prefix.columns > self.columns:
            raise ValueError(f"a prefix of {prefix.columns} columns does not fit in a slot of {self.columns}")
        self.keys[:, slot, :, : prefix.columns] = prefix.keys
        self.values[:, slot, :, : prefix.columns] = prefix.values


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a sequence's first columns (for example, a picture's), each [N, K, L, E], kept for reuse.

    ``position`` is the one of the token after them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    position: int = 0

    @property
    def columns(self) -> int:
        """L, the number of columns."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def cpu(self) -> Prefix:
        """Return a copy in host memory."""
        return Prefix(self.keys.cpu(), self.values.cpu(), self.position)


class SlotView:
    """One slot as the cache of a forward pass, with the methods of transformers' caches that the model uses.

    ``length`` columns are filled already; layers write new ones after them, and `advance` counts them.
    """

    def __init__(self, cache: SlotCache, slot: int, length: int = 0) -> None:
        self._cache, self.slot, self.length = cache, slot, length

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values [1, K, L, E] and return all of the slot's so far, as views [1, K, length + L, E].

        Raises:
            ValueError: the slot is too short.
        """
        end = self.length + k.shape[2]
        if end > self._cache.columns:
            raise ValueError(f"{end} columns do not fit in a slot of {self._cache.columns}")
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self.slot, :, self.length : end] = k[0]
        values[self.slot, :, self.length : end] = v[0]
        return keys[self.slot : self.slot + 1, :, :end], values[self.slot : self.slot + 1, :, :end]

    def get_seq_length(self) -> int:
        """Return the number of filled columns."""
        return self.length

    def get_mask_sizes(self, columns: int, layer: int) -> tuple[int, int]:
        """Return how many columns ``columns`` new ones see, and the first of them."""
        return self.length + columns, 0

    def advance(self, columns: int) -> None:
        """Count ``columns`` new ones as filled."""
        self.length += columns


class SlotRows:
    """Several slots as the cache of one forward pass: row r goes to ``slots[r]``, after its ``lengths[r]`` columns.

    Rows may be padded on the right. What padding writes lies after a row's tokens, or in a slot's last column,
    which no prompt fills; a decode step overwrites it before it is read.

    Args:
        columns: L, the new columns of every row.

    Attributes:
        visible: bool [B, 1, L, C'], which of the first C' columns each new one sees.
    """

    def __init__(self, cache: SlotCache, slots: Sequence[int], lengths: Sequence[int], columns: int) -> None:
        device = cache.keys.device
        self._cache, self._new = cache, columns
        self._span = min(max(lengths) + columns, cache.columns)
        at = torch.tensor(lengths)[:, None] + torch.arange(columns)
        self._at = at.clamp(max=cache.columns - 1).to(device, non_blocking=True)
        self._slots = torch.tensor(slots).to(device, non_blocking=True)
        self.visible = (torch.arange(self._span, device=device) <= self._at[..., None])[:, None]

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values [B, K, L, E] and return copies of the slots' first columns, [B, K, C', E]."""
        found = []
        for new, whole in ((k, self._cache.keys[layer]), (v, self._cache.values[layer])):
            whole[self._slots[:, None], :, self._at] = new.transpose(1, 2)
            found.append(whole[:, :, : self._span].index_select(0, self._slots))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Return 0: each row has a length of its own, which ``visible`` knows."""
        return 0

    def get_mask_sizes(self, columns: int, layer: int) -> tuple[int, int]:
        """Return how many columns ``columns`` new ones see, and the first of them."""
        return self._span, 0
