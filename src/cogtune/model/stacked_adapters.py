"""Several low-rank adapters beside one base, chosen for every row of a batch.

The matrices of all adapters are stacked per linear layer, with ranks padded to one size. A forward pass either uses one
adapter for all tokens (a prefill) or one for each row (a decode step). The choice is a tensor on the device, so a
captured step serves any mixture. A layer that no adapter touches stays as it is: adapters on vision experts alone cost
nothing in decode steps, which do not run them.

Shapes: n adapters, E padded rank, M tokens, R rows, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cogtune.configuration.shapes import TOWER_PARTS
from cogtune.model.compiler_workarounds import add_product
from cogtune.model.swiglu import LowRankUpdate

NONE = -1
"""Index of the base model without an adapter."""
_LEAST = 16  # the decode kernels multiply ranks of at least 16
Update = tuple[torch.Tensor, torch.Tensor]
"""A [r, I] and scaled B [O, r] of one layer."""


class Selection:
    """Which adapter computes now.

    Attributes:
        one: the adapter of all tokens, `NONE` for none; not used while there are ``rows``.
        rows: int64 [R] on the device, the adapter of each row.
    """

    def __init__(self) -> None:
        self.one = NONE
        self.rows: torch.Tensor | None = None


class StackedLinear(nn.Module):
    """``base(x) + (x A') (s B)'`` with the selected adapter's A and B, which are zero where it has none."""

    first: torch.Tensor
    second: torch.Tensor
    owner: torch.Tensor

    def __init__(self, base: nn.Module, updates: list[Update | None], padded: int, selection: Selection) -> None:
        super().__init__()
        self.base_layer, self.padded, self.selection = base, padded, selection
        self.ranks = [0 if update is None else update[0].shape[0] for update in updates]
        a, b = next(update for update in updates if update is not None)
        first, second = a.new_zeros(len(updates) * padded, a.shape[1]), b.new_zeros(b.shape[0], len(updates) * padded)
        for number, update in enumerate(updates):
            if update is not None:
                start, stop = number * padded, number * padded + update[0].shape[0]
                first[start:stop], second[:, start:stop] = update
        self.register_buffer("first", first, persistent=False)  # [n E, I]
        self.register_buffer("second", second, persistent=False)  # [O, n E]
        self.register_buffer("owner", torch.arange(len(first), device=a.device) // padded, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base_layer(x)
        rows = self.selection.rows
        if rows is not None:
            mine = self.owner == rows[:, None]
            return add_product(found, functional.linear(x, self.first) * mine, self.second)
        update = self.low_rank_update(x.dtype)
        return found if update is None else add_product(found, update.small(x), update.second)

    def low_rank_update(self, dtype: torch.dtype) -> LowRankUpdate | None:
        """Return the update of the adapter selected for all tokens; see `model.swiglu`."""
        one = self.selection.one
        if self.selection.rows is not None or one == NONE or not self.ranks[one]:
            return None
        its = slice(one * self.padded, one * self.padded + self.ranks[one])
        return LowRankUpdate(self.first[its].to(dtype), self.second[:, its].to(dtype).contiguous(), None)


class StackedAdapters:
    """Named adapters in place on ``model``, whose layers it replaces.

    Args:
        updates: of each adapter, by module name; matrices in any format, on any device.

    Attributes:
        names: of the adapters, in the order of their indices.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, Mapping[str, Update]]) -> None:
        self.names = tuple(updates)
        self._index: dict[str | None, int] = {name: number for number, name in enumerate(updates)} | {None: NONE}
        self._selection = Selection()
        adapters = list(updates.values())
        ranks = [a.shape[0] for adapter in adapters for a, _ in adapter.values()]
        padded = max(_LEAST, 1 << (max(ranks, default=1) - 1).bit_length())
        self._of_tower = [any(_in_tower(module) for module in adapter) for adapter in adapters]
        for module in dict.fromkeys(module for adapter in adapters for module in adapter):
            base: Any = model.get_submodule(module)
            # not the weight's device: layers may be streamed from host memory
            place: dict[str, Any] = {"device": getattr(model, "device", None), "dtype": getattr(model, "dtype", None)}
            stacked = [
                (adapter[module][0].to(**place), adapter[module][1].to(**place)) if module in adapter else None
                for adapter in adapters
            ]
            model.set_submodule(module, StackedLinear(base, stacked, padded, self._selection))

    def index(self, name: str | None) -> int:
        """Return the index of an adapter, `NONE` for the base model.

        Raises:
            KeyError: there is no such adapter.
        """
        return self._index[name]

    def changes_features(self, index: int) -> bool:
        """Return whether the adapter changes the tower's output. All adapters may change keys and values."""
        return index != NONE and self._of_tower[index]

    @contextmanager
    def using(self, index: int) -> Iterator[None]:
        """Compute all tokens with one adapter."""
        self._selection.one = index
        try:
            yield
        finally:
            self._selection.one = NONE

    @contextmanager
    def rows(self, adapters_R: torch.Tensor) -> Iterator[None]:
        """Compute each row with its own adapter (int64 [R], `NONE` for none)."""
        self._selection.rows = adapters_R
        try:
            yield
        finally:
            self._selection.rows = None


def _in_tower(module: str) -> bool:
    return any(f".vision.{part}." in f".{module}." for part in TOWER_PARTS)
