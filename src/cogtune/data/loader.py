"""Batches, or the frames of clips, from worker processes or from this one; an error in a worker is raised or given here
with its own type."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, get_worker_info

from cogtune.data.collate import collate
from cogtune.data.dataset import RowIndex, RowSample, TrainRows
from cogtune.data.pixels import tower_inputs
from cogtune.data.records import ImageRef
from cogtune.data.sampler import EpochSampler
from cogtune.errors import CogtuneError, DataError, RunError
from cogtune.language import tr
from cogtune.model.routing import GPU_COLUMNS


def batches(
    rows: TrainRows, sampler: EpochSampler, workers: int = 0, *, for_gpu: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield one collated batch per item of the sampler, in order. ``for_gpu``: in pinned memory and a GPU's layout.

    Raises:
        CogtuneError: as raised while a row was built, in whichever process; or a worker finds no shared memory.
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


def clips_ahead(
    clips: Sequence[Sequence[ImageRef]], size: int, *, ahead: int, workers: int
) -> Iterator[tuple[torch.Tensor, ...] | DataError]:
    """Yield the frames of each clip in order, float32 [3, S, S] each, or why they cannot be decoded.

    Worker processes decode up to ``ahead`` clips beyond the one that is taken. Threads would be enough to decode, but
    the Python of many of them stands in the way of the thread that feeds the device.

    Raises:
        SetupError: PyAV is not installed.
    """
    loader: DataLoader[Any] = DataLoader(
        _Clips(clips, size),  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=-(-ahead // workers),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    for found in loader:
        if isinstance(found, CogtuneError) and not isinstance(found, DataError):
            raise found
        yield found if isinstance(found, DataError) else tuple(torch.from_numpy(found))


class _Clips:
    """The decoded frames of clips, as arrays: sent through a pipe they need no shared memory, which may be small."""

    def __init__(self, clips: Sequence[Sequence[ImageRef]], size: int) -> None:
        self._clips, self._size = clips, size

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> npt.NDArray[np.float32] | CogtuneError:
        try:
            return torch.stack(list(tower_inputs(self._clips[index], self._size))).numpy()
        except CogtuneError as error:
            return error


def _as_it_is(item: Any) -> Any:
    return item


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
    batch = collate(rows, column_multiple, vision_experts=vision_experts)
    return batch if get_worker_info() is None else _shared_or_error(batch)


def _shared_or_error(batch: dict[str, Any]) -> dict[str, Any] | CogtuneError:
    """Put a batch into shared memory, through which it leaves a worker. The thread that sends it would do so too, but
    can only print an error, and the batch would be awaited for ever."""
    try:
        for value in (*batch.values(), *vars(batch["routing"]).values()):
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return RunError(
            tr("a data worker cannot pass its batch on: {error}", error=error),
            hint=tr("docker run --shm-size 8g (or --ipc host) makes /dev/shm larger; without: --data.workers 0"),
            code="shared-memory",
        )
    return batch


def explain_worker(error: BaseException) -> RunError | None:
    """Return the error to show if ``error`` says that a worker was killed, otherwise None.

    Torch raises it between any two lines of the main thread, as a signal's handler does.
    """
    text = str(error)
    if not text.startswith("DataLoader worker (pid"):
        return None
    return RunError(
        tr("a data worker has ended: {text}", text=text.strip()),
        hint=tr(
            "killed means that host memory was full: fewer --data.workers; a bus error that /dev/shm was: docker run"
            " --shm-size 8g, or --data.workers 0"
        ),
        code="data-worker",
    )


def _start_worker(_: int) -> None:
    """Prepare a worker process: one thread, no tokenizer threads after the fork, and stop signals ignored.

    A stop signal is for the training process, which still needs this step's batches; workers end with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
