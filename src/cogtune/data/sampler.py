"""Which rows every rank reads, in which order: a function of (seed, epoch) only, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

RowIndex = tuple[int, int]
Position = tuple[int, int]

_ORDER, _DRAW = 0, 1


class EpochSampler:
    """Batches of ``(epoch, row)`` for one rank; None is a filler row. Use it as a DataLoader's ``batch_sampler``.

    A global batch takes the next ``world_size * batch_size`` rows of the epoch's order, rank 0 first. All ranks yield
    the same number of batches; only an epoch's last global batch can hold fillers.

    A position is ``(epoch, rows of it already taken, over all ranks)``. It means the same under any number of ranks.

    :param weights: how often an epoch shows each row: floor(w) times, and once more by a seeded draw of the fraction.
    :param epochs: iteration ends before this epoch.
    :param start: the position to begin from, as after a resume.
    :param shuffle: False keeps the rows in their own order, for validation.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        *,
        weights: Sequence[float] | None = None,
        epochs: int = 1,
        start: Position = (0, 0),
        shuffle: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} ranks")
        if weights is not None and len(weights) != num_rows:
            raise ValueError(f"{len(weights)} weights for {num_rows} rows")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epochs = epochs
        self.start = start
        self.shuffle = shuffle
        even = weights is None or all(weight == 1 for weight in weights)
        self._weights = None if even else np.asarray(weights, dtype=np.float64)
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def global_batch(self) -> int:
        """Rows of one batch over all ranks."""
        return self.world_size * self.batch_size

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The rows of an epoch in the order in which they are trained."""
        return self._order(epoch)

    def rows_in_epoch(self, epoch: int) -> int:
        """How many rows an epoch shows; with fractional weights it varies a little between epochs."""
        return len(self._counts(epoch)) if self._weights is None else int(self._counts(epoch).sum())

    def batches_in_epoch(self, epoch: int, rows_taken: int = 0) -> int:
        """How many batches every rank still gets in an epoch after ``rows_taken`` of its rows."""
        return -(-max(0, self.rows_in_epoch(epoch) - rows_taken) // self.global_batch)

    def next_position(self, position: Position) -> Position:
        """Where the sampler stands one global batch after ``position``."""
        epoch, taken = position
        taken += self.global_batch
        return (epoch + 1, 0) if taken >= self.rows_in_epoch(epoch) else (epoch, taken)

    def __len__(self) -> int:
        """Batches of this rank from ``start`` to the end of the last epoch."""
        epoch, taken = self.start
        return sum(self.batches_in_epoch(e, taken if e == epoch else 0) for e in range(epoch, self.epochs))

    def __iter__(self) -> Iterator[list[RowIndex | None]]:
        first, taken = self.start
        for epoch in range(first, self.epochs):
            order = self.order(epoch)
            begin = taken if epoch == first else 0
            for base in range(begin, len(order), self.global_batch):
                mine = base + self.rank * self.batch_size
                rows = order[mine : mine + self.batch_size].tolist()
                batch: list[RowIndex | None] = [(epoch, row) for row in rows]
                yield batch + [None] * (self.batch_size - len(batch))

    def _counts(self, epoch: int) -> npt.NDArray[np.int64]:
        """How often each row is shown in an epoch."""
        if self._weights is None:
            return np.ones(self.num_rows, dtype=np.int64)
        whole = np.floor(self._weights)
        draws = (self._raw(epoch, _DRAW, self.num_rows) >> np.uint64(11)) * 2.0**-53
        return (whole + (draws < self._weights - whole)).astype(np.int64)

    def _make_order(self, epoch: int) -> npt.NDArray[np.int64]:
        rows = np.repeat(np.arange(self.num_rows, dtype=np.int64), self._counts(epoch))
        if not self.shuffle:
            return rows
        return rows[np.argsort(self._raw(epoch, _ORDER, len(rows)), kind="stable")]

    def _raw(self, epoch: int, purpose: int, count: int) -> npt.NDArray[np.uint64]:
        """Random 64-bit numbers. Raw bit streams never change between numpy releases; its ``permutation`` may."""
        entropy = np.random.SeedSequence([self.seed, epoch, purpose])
        return np.asarray(np.random.PCG64(entropy).random_raw(count), dtype=np.uint64)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._make_order)
