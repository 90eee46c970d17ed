"""Keys and values of many conversations at once: one slot each, all of one length, allocated once.

Shapes: N layers, S slots, C columns of a slot, K key/value heads, E head width, L new columns.

A slot is filled by prefill through a `SlotView`, which is the cache that the model's forward writes to, and then grows
by one column a decode step (``model.decode``). The columns behind a slot's length hold whatever was there before; no
attention looks at them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cogtune.configuration.model import CogVLM2Config


class SlotCache:
    """Room for ``slots`` sequences of at most ``columns`` tokens.

    Args:
        config: layers, heads and head width.
        dtype, device: of the keys and values.

    Attributes:
        keys, values: [N, S, K, C, E].
    """

    def __init__(
        self, config: CogVLM2Config, slots: int, columns: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if slots < 1 or columns < 1:
            raise ValueError(f"{slots} slots of {columns} columns; both have to be at least 1")
        shape = (config.num_hidden_layers, slots, config.num_multi_query_heads, columns, config.head_dim)
        # zeros, not empty: a masked column is multiplied by a probability of 0, and 0 times garbage may be NaN
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        """How many sequences fit."""
        return int(self.keys.shape[1])

    @property
    def columns(self) -> int:
        """How many tokens fit in a slot."""
        return int(self.keys.shape[3])

    @staticmethod
    def bytes_per_column(config: CogVLM2Config, dtype: torch.dtype) -> int:
        """Memory of one token's keys and values in all layers."""
        return 2 * config.num_hidden_layers * config.num_multi_query_heads * config.head_dim * dtype.itemsize

    def resized(self, slots: int, columns: int) -> SlotCache:
        """A larger cache that begins with what this one holds."""
        found = SlotCache.__new__(SlotCache)
        layers, before, heads, length, width = self.keys.shape
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(layers, slots, heads, columns, width)
            new[:, :before, :, :length] = old
            setattr(found, name, new)
        return found

    def copy_out(self, slot: int, columns: int) -> Prefix:
        """A copy of a slot's first columns."""
        return Prefix(self.keys[:, slot, :, :columns].clone(), self.values[:, slot, :, :columns].clone())

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
    """Keys and values of a sequence's first columns, each [N, K, L, E]: a picture's, to be used again."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def columns(self) -> int:
        """L."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.keys.nbytes + self.values.nbytes


class SlotView:
    """One slot as the cache of a forward pass: what the model asks of transformers' caches, and no more.

    ``length`` columns are there already; the layers add new ones behind them, and `advance` counts them.
    """

    def __init__(self, cache: SlotCache, slot: int, length: int = 0) -> None:
        self._cache, self._slot, self.length = cache, slot, length

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values [1, K, L, E]; returns all of the slot's so far, views [1, K, length + L, E].

        Raises:
            ValueError: the slot is too short.
        """
        end = self.length + k.shape[2]
        if end > self._cache.columns:
            raise ValueError(f"{end} columns do not fit in a slot of {self._cache.columns}")
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._slot, :, self.length : end] = k[0]
        values[self._slot, :, self.length : end] = v[0]
        return keys[self._slot : self._slot + 1, :, :end], values[self._slot : self._slot + 1, :, :end]

    def get_seq_length(self) -> int:
        """How many columns are there."""
        return self.length

    def get_mask_sizes(self, columns: int, layer: int) -> tuple[int, int]:
        """Columns that ``columns`` new ones see, and the first of them."""
        return self.length + columns, 0

    def advance(self, columns: int) -> None:
        """``columns`` new ones are there now."""
        self.length += columns
