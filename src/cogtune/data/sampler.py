"""Assigns rows to ranks and batches. The order depends on (seed, epoch) only, not on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt

RowIndex = tuple[int, int]
Position = tuple[int, int]

_ORDER, _DRAW, _BLOCKS = 0, 1, 2
# Sorting by length: windows of _WINDOW shuffled rows are sorted, then cut into blocks of _BLOCK, and all blocks are
# shuffled. Both sizes are constants, so the order depends neither on ranks nor on batch sizes.
_WINDOW, _BLOCK = 512, 16


class EpochSampler:
    """Batches of ``(epoch, row)`` for one rank; None is a filler row. Use it as a DataLoader's ``batch_sampler``.

    A global batch is the next ``world_size * batch_size`` rows of the epoch's order. A step is the next
    ``accumulation`` global batches, fewer at the end of an epoch. Its rows are dealt to the ranks so that each has
    about as many tokens; without ``lengths``, rank 0 has the first rows of every global batch. All ranks yield the same
    number of batches, since engines communicate in each of them; only an epoch's last step can hold fillers. With
    ``most_tokens``, a rank's rows of a step are the same but are cut into batches of at most that many tokens; a rank
    with fewer batches than another gets filler batches.

    A position is ``(epoch, rows already taken from it over all ranks)``, so it is valid for any number of ranks.

    Args:
        weights: how often an epoch shows each row: floor(w) times, plus once with the probability of the fraction.
        epochs: iteration ends before this epoch.
        start: the first position, after a resume for example.
        shuffle: False keeps the rows in their own order, for validation.
        lengths: tokens of every row; with several ranks each step's rows are dealt by it. Required by the next two.
        by_length: put rows of similar length next to each other.
        most_tokens: token limit of a batch, instead of ``batch_size`` rows; a longer row is a batch of its own.
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
        accumulation: int = 1,
        lengths: Sequence[int] | None = None,
        by_length: bool = False,
        most_tokens: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} ranks")
        if weights is not None and len(weights) != num_rows:
            raise ValueError(f"{len(weights)} weights for {num_rows} rows")
        if lengths is None and (by_length or most_tokens is not None):
            raise ValueError("by_length and most_tokens need the rows' lengths")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epochs = epochs
        self.start = start
        self.shuffle = shuffle
        self.accumulation = accumulation
        self.most_tokens = most_tokens
        self._by_length = by_length
        self._lengths = np.asarray([] if lengths is None else lengths, dtype=np.int64)
        even = weights is None or all(weight == 1 for weight in weights)
        self._weights = None if even else np.asarray(weights, dtype=np.float64)
        self._remember()

    def _remember(self) -> None:
        """Keep what was computed of the last epochs: it is asked for at every step and looks at every row."""
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._size = lru_cache(maxsize=2)(lambda epoch: int(self._counts(epoch).sum()))

    @property
    def global_batch(self) -> int:
        """Rows of one batch over all ranks."""
        return self.world_size * self.batch_size

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the rows of an epoch in training order."""
        return self._order(epoch)

    def rows_in_epoch(self, epoch: int) -> int:
        """Return the rows of an epoch; with fractional weights it varies a little between epochs."""
        return self.num_rows if self._weights is None else self._size(epoch)

    @property
    def step_rows(self) -> int:
        """Rows of one step over all ranks."""
        return self.global_batch * self.accumulation

    def steps_in_epoch(self, epoch: int, rows_taken: int = 0) -> int:
        """Return the steps left in an epoch after ``rows_taken`` of its rows."""
        return -(-max(0, self.rows_in_epoch(epoch) - rows_taken) // self.step_rows)

    # -(-a // b) is division rounded up, here and below

    def step(self, position: Position) -> tuple[int, Position]:
        """Return the number of batches per rank in the step at ``position``, and the position after it."""
        epoch, taken = position
        end = min(taken + self.step_rows, self.rows_in_epoch(epoch))
        batches = -(-(end - taken) // self.global_batch)
        if self.most_tokens is not None:
            batches = max(len(self._cut(epoch, taken, rank)) for rank in range(self.world_size))
        return batches, (epoch + 1, 0) if end == self.rows_in_epoch(epoch) else (epoch, end)

    def __len__(self) -> int:
        """Return this rank's batches from ``start`` to the end of the last epoch."""
        position, batches = self.start, 0
        while position[0] < self.epochs:
            found, position = self.step(position)
            batches += found
        return batches

    def __iter__(self) -> Iterator[list[RowIndex | None]]:
        position = self.start
        while position[0] < self.epochs:
            count, after = self.step(position)
            batches = self._cut(*position, self.rank)
            yield from batches + [[None]] * (count - len(batches))
            position = after

    def _cut(self, epoch: int, taken: int, rank: int) -> list[list[RowIndex | None]]:
        """Return a rank's batches in the step that starts after ``taken`` rows."""
        parts = self._share(self.order(epoch)[taken:][: self.step_rows], rank)
        batches: list[list[RowIndex | None]] = []
        # fixed number of rows: the parts are the batches, filled up with None
        if self.most_tokens is None:
            for part in parts:
                batches.append([(epoch, row) for row in part])
                batches[-1] += [None] * (self.batch_size - len(part))
            return batches
        # token limit: pack the same rows greedily, in order
        room = 0
        for row in chain.from_iterable(parts):
            length = int(self._lengths[row])
            if not batches or length > room:
                batches.append([])
                room = self.most_tokens
            batches[-1].append((epoch, row))
            room -= length
        return batches

    def _share(self, rows: npt.NDArray[np.int64], rank: int) -> list[list[int]]:
        """Return a rank's rows of a step, batch by batch.

        With lengths, several ranks get rows that take about as long: sorted, they are dealt from rank 0 to the last and
        back again. Otherwise each rank has its slice of every global batch.
        """
        starts = range(0, len(rows), self.global_batch)
        if self.world_size == 1 or not self._lengths.size:
            return [rows[start + rank * self.batch_size :][: self.batch_size].tolist() for start in starts]
        turn = 2 * self.world_size
        place = np.arange(len(rows)) % turn
        dealt = rows[np.argsort(-self._lengths[rows], kind="stable")]
        own = dealt[(place == rank) | (place == turn - 1 - rank)].tolist()
        return [own[first * self.batch_size :][: self.batch_size] for first in range(len(starts))]

    def _counts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return how often each row is shown in an epoch."""
        if self._weights is None:
            return np.ones(self.num_rows, dtype=np.int64)
        whole = np.floor(self._weights)
        # uniform float64 in [0, 1) from the upper 53 bits
        draws = (self._raw(epoch, _DRAW, self.num_rows) >> np.uint64(11)) * 2.0**-53
        return (whole + (draws < self._weights - whole)).astype(np.int64)

    def _make_order(self, epoch: int) -> npt.NDArray[np.int64]:
        rows = np.repeat(np.arange(self.num_rows, dtype=np.int64), self._counts(epoch))
        if not self.shuffle:
            return rows
        rows = rows[np.argsort(self._raw(epoch, _ORDER, len(rows)), kind="stable")]
        return self._grouped(rows, epoch) if self._by_length else rows

    def _grouped(self, rows: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.int64]:
        """Return the rows with similar lengths next to each other, in shuffled blocks."""
        windows = [rows[start : start + _WINDOW] for start in range(0, len(rows), _WINDOW)]
        windows = [window[np.argsort(self._lengths[window], kind="stable")] for window in windows]
        blocks = [window[start : start + _BLOCK] for window in windows for start in range(0, len(window), _BLOCK)]
        if not blocks:
            return rows
        return np.concatenate([blocks[i] for i in np.argsort(self._raw(epoch, _BLOCKS, len(blocks)), kind="stable")])

    def _raw(self, epoch: int, purpose: int, count: int) -> npt.NDArray[np.uint64]:
        """Return random 64-bit numbers. PCG64's raw stream is stable across numpy releases; ``permutation`` is not."""
        entropy = np.random.SeedSequence([self.seed, epoch, purpose])
        return np.asarray(np.random.PCG64(entropy).random_raw(count), dtype=np.uint64)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_order", "_size")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._remember()
