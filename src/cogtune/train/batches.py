"""Batches for one rank, grouped into optimiser steps, and the number of steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cogtune.configuration.resolve import resolve_workers
from cogtune.configuration.run_config import RunConfig
from cogtune.data.dataset import TrainRows
from cogtune.data.loader import batches
from cogtune.data.sampler import EpochSampler, Position
from cogtune.distributed.group import Group
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.train.log import log

Batch = dict[str, Any]
ONLY_FOR_THE_LOOP = ("record_ids", "num_labels", "skipped")
"""Parts of a batch that the model does not take."""


@dataclass(frozen=True)
class StepBatches:
    """One optimiser step of this rank: up to ``accumulation`` micro-batches, and the data position after them."""

    batches: list[Batch]
    position: Position


class Feed:
    """Training rows grouped into steps. The position counts consumed batches, so prefetching workers do not affect it.

    A step never crosses an epoch: the last step of an epoch may have fewer micro-batches, the same on every rank.
    """

    def __init__(self, rows: TrainRows, config: RunConfig, group: Group, accumulation: int) -> None:
        self.rows = rows
        self.accumulation = accumulation
        self._config = config
        self._group = group

    def steps_in_epoch(self, epoch: int) -> int:
        return self._epochs.steps_in_epoch(epoch)

    def total_steps(self) -> int:
        """Return ``train.max_steps``, or the steps of ``train.epochs``; 0 if small weights leave those epochs empty."""
        train = self._config.train
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(train.epochs))
        return min(train.max_steps or steps, steps) if steps == 0 else train.max_steps or steps

    def rows_in_epoch(self, epoch: int) -> int:
        return self._epochs.rows_in_epoch(epoch)

    def shown(self, start: Position, steps: int) -> npt.NDArray[np.int64]:
        """Return how often each row is trained on in the next ``steps`` steps, over all ranks."""
        sampler = self._epochs
        counts = np.zeros(len(self.rows), dtype=np.int64)
        (epoch, taken), step_rows = start, sampler.step_rows
        while steps > 0:
            rows = sampler.order(epoch)[taken:][: steps * step_rows]
            counts += np.bincount(rows, minlength=len(counts))
            steps -= -(-len(rows) // step_rows)
            epoch, taken = epoch + 1, 0
        return counts

    def steps(self, start: Position) -> Iterator[StepBatches]:
        """Yield steps from a position on, epoch after epoch without end."""
        sampler = self._sampler(start, 2**31)
        position, step, count, after = start, list[Batch](), 0, start
        workers = resolve_workers(self._config.data.workers, self._group.local_size)
        on_gpu = self._group.device.type == "cuda"
        for batch in batches(self.rows, sampler, workers, for_gpu=on_gpu):
            while not step and count == 0:  # small weights can leave an epoch empty: skip it
                count, after = sampler.step(position)
                position = after if count == 0 else position
            step.append(batch)
            if len(step) == count:
                yield StepBatches(step, after)
                position, step, count = after, [], 0

    @cached_property
    def _epochs(self) -> EpochSampler:
        """What is asked about whole epochs, at every step. Making a sampler looks at every row."""
        return self._sampler((0, 0), 1)

    def _sampler(self, start: Position, epochs: int) -> EpochSampler:
        train, group = self._config.train, self._group
        return EpochSampler(
            len(self.rows),
            train.batch_size,
            group.rank,
            group.size,
            train.seed,
            weights=self.rows.weights,
            epochs=epochs,
            start=start,
            accumulation=self.accumulation,
            lengths=self.rows.lengths,
            by_length=self._config.data.group_by_length,
            most_tokens=self._config.data.batch_tokens,
        )


def validation_batches(rows: TrainRows, config: RunConfig, group: Group) -> Iterator[Batch]:
    """Return batches with every validation row once, distributed over ranks; short ranks get fillers, so all have as
    many."""
    size = config.eval.batch_size or config.train.batch_size
    sampler = EpochSampler(len(rows), size, group.rank, group.size, shuffle=False)
    workers = resolve_workers(config.data.workers, group.local_size)
    return batches(rows, sampler, workers, for_gpu=group.device.type == "cuda")


class SkippedRows:
    """Names rows that were left out for their images, each once, and ends a run that leaves out too many.

    Every rank counts its own. ``rows``: returns how many there are for all ``ranks``.
    """

    def __init__(self, config: RunConfig, rows: Callable[[], int], ranks: int) -> None:
        self._rows, self._ranks, self._share = rows, ranks, config.data.max_bad_share
        self._told: set[str] = set()

    def look_at(self, batch: Batch) -> None:
        """Log what was left out for ``batch``.

        Raises:
            DataError: ``data-bad-share``.
        """
        for what in batch.get("skipped", ()):
            if what in self._told:
                continue
            self._told.add(what)
            log.warning(tr("left out, another row in its place: {what}", what=what))
            if len(self._told) > self._share * -(-self._rows() // self._ranks):
                raise DataError(
                    tr(
                        "{count} pictures could not be decoded, more than data.max_bad_share ({share:g}) allows; the"
                        " last: {what}",
                        count=len(self._told),
                        share=self._share,
                        what=what,
                    ),
                    hint=tr("`cogtune data check --full` finds all; repair the data, or raise data.max_bad_share"),
                    code="data-bad-share",
                )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the model's arguments to ``device``; drop what only the loop uses."""
    arguments = {name: value for name, value in batch.items() if name not in ONLY_FOR_THE_LOOP}
    return {name: value.to(device, non_blocking=True) for name, value in arguments.items()}
