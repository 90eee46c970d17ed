"""Batches from worker processes or from this one; an error in a worker is raised here with its own type."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from cogtune.data.collate import collate
from cogtune.data.dataset import RowIndex, RowSample, TrainRows
from cogtune.data.sampler import EpochSampler
from cogtune.errors import CogtuneError
from cogtune.model.routing import GPU_COLUMNS


def batches(
    rows: TrainRows, sampler: EpochSampler, workers: int = 0, *, for_gpu: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield one collated batch per item of the sampler, in order. ``for_gpu``: in pinned memory and a GPU's layout.

    Raises:
        CogtuneError: as raised while a row was built, in whichever process.
    """
    loader: DataLoader[Any] = DataLoader(
        _Guarded(rows),  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=functools.partial(
            _collate_or_error, column_multiple=GPU_COLUMNS if for_gpu else 1, vision_experts=rows.vision_experts
        ),
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        # a generator of its own, so that making an iterator does not advance training's random state
        generator=torch.Generator(),
        pin_memory=for_gpu,
    )
    for batch in loader:
        if isinstance(batch, CogtuneError):
            raise batch
        yield batch


class _Guarded:
    """Wraps `TrainRows` to return errors as values: raised in a worker, they would arrive as a traceback's text."""

    def __init__(self, rows: TrainRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: RowIndex | None) -> RowSample | CogtuneError:
        try:
            return self._rows[index]
        except CogtuneError as error:
            return error


def _collate_or_error(
    items: Sequence[RowSample | CogtuneError], column_multiple: int, vision_experts: bool
) -> dict[str, Any] | CogtuneError:
    rows: list[RowSample] = []
    for item in items:
        if isinstance(item, CogtuneError):
            return item
        rows.append(item)
    return collate(rows, column_multiple, vision_experts=vision_experts)


def _start_worker(_: int) -> None:
    """Prepare a worker process: one thread, no tokenizer threads after the fork, and stop signals ignored.

    A stop signal is for the training process, which still needs this step's batches; workers end with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
