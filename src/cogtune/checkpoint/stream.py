"""Read the tensors of safetensors files one after the other, each straight to its final device.

Several threads prefetch, because one does not reach the speed of page cache or disk. For the CPU they read into the
tensor itself. For a GPU they read into a few pinned buffers, from which pieces are copied while the next ones are read.
So host memory holds those buffers and never a whole shard; the page cache is shared by all processes.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogtune.errors import CheckpointError
from cogtune.language import tr

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes of the safetensors format that a model may be stored in."""

PIECE = 32 * 2**20
"""Bytes read at a time."""
AHEAD = 8
"""Pieces in flight; for a GPU this is the number of pinned buffers, 256 MiB in total."""
THREADS = 4


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; ``start`` and ``stop`` are bytes of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])


def find_stored(file: Path, header: dict[str, dict[str, Any]]) -> list[StoredTensor]:
    """Return the tensors of a file in byte order, from its header (`checkpoint.model_files.read_header`)."""
    payload = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    begin = file.stat().st_size - payload
    found = [
        StoredTensor(
            name,
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            begin + entry["data_offsets"][0],
            begin + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    ]
    return sorted(found, key=lambda tensor: tensor.start)


def read_whole(tensor: StoredTensor) -> torch.Tensor:
    """Return a tensor on the CPU in its stored dtype.

    Raises:
        CheckpointError: as `stream`.
    """
    ((_, value),) = stream([tensor], lambda name: torch.device("cpu"))
    return value


def stream(
    tensors: Sequence[StoredTensor], device_for: Callable[[str], torch.device]
) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
    """Yield each tensor in its stored dtype on its device, in the given order (file order is fastest).

    Raises:
        CheckpointError: a file is truncated or unreadable, or has an unknown dtype.
    """
    with ThreadPoolExecutor(THREADS, "cogtune-read") as pool:
        reader = _Reader(pool)
        try:
            yield from reader.read(tensors, device_for)
        finally:
            reader.stop()


@dataclass
class _Piece:
    """A part of a tensor in flight, starting at ``offset`` of ``target`` (the whole tensor as bytes)."""

    stored: StoredTensor
    target: torch.Tensor | None  # None: on a GPU, allocated when the tensor's first piece has been read
    offset: int
    size: int
    slot: int | None
    done: Future[None] | None = None


class _Reader:
    """The queue of pieces in flight, in order."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._underway: deque[_Piece] = deque()
        self._buffers: torch.Tensor | None = None
        self._copied: list[torch.cuda.Event | None] = [None] * AHEAD
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        for piece in self._underway:
            if piece.done is not None:
                piece.done.cancel()

    def read(
        self, tensors: Sequence[StoredTensor], device_for: Callable[[str], torch.device]
    ) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
        pieces = self._pieces(tensors, device_for)
        target: torch.Tensor | None = None
        self._fill(pieces)
        while self._underway:
            piece = self._underway.popleft()
            assert piece.done is not None
            piece.done.result()
            if piece.slot is None:
                target = piece.target
            else:
                device = device_for(piece.stored.name)
                if piece.offset == 0:
                    target = torch.empty(piece.stored.stop - piece.stored.start, dtype=torch.uint8, device=device)
                assert target is not None
                self._copy(piece, target)
            last = piece.offset + piece.size == piece.stored.stop - piece.stored.start
            self._fill(pieces)
            if last:
                assert target is not None
                value = target.view(_dtype(piece.stored)).view(piece.stored.shape)
                target = piece.target = None
                yield piece.stored, value

    def _pieces(self, tensors: Sequence[StoredTensor], device_for: Callable[[str], torch.device]) -> Iterator[_Piece]:
        number = 0
        for stored in tensors:
            size = stored.stop - stored.start
            expected = math.prod(stored.shape) * _dtype(stored).itemsize
            if size != expected:
                raise _unreadable(
                    stored,
                    tr(
                        "{name} takes {size:,} bytes, {expected:,} expected",
                        name=stored.name,
                        size=size,
                        expected=expected,
                    ),
                )
            on_gpu = device_for(stored.name).type != "cpu"
            target = None if on_gpu else torch.empty(size, dtype=torch.uint8)
            for offset in range(0, max(size, 1), PIECE):
                slot = number % AHEAD if on_gpu else None
                number += 1
                yield _Piece(stored, target, offset, min(PIECE, size - offset), slot)

    def _fill(self, pieces: Iterator[_Piece]) -> None:
        while len(self._underway) < AHEAD and (piece := next(pieces, None)) is not None:
            if piece.slot is not None and self._buffers is None:
                self._buffers = torch.empty(AHEAD, PIECE, dtype=torch.uint8, pin_memory=True)
            piece.done = self._pool.submit(self._fetch, piece)
            self._underway.append(piece)

    def _fetch(self, piece: _Piece) -> None:
        """Read one piece from its file. Runs in a worker thread."""
        if self._stopped.is_set() or piece.size == 0:
            return
        if piece.slot is None:
            assert piece.target is not None
            into = piece.target[piece.offset : piece.offset + piece.size]
        else:
            assert self._buffers is not None
            copied = self._copied[piece.slot]
            if copied is not None:
                copied.synchronize()  # wait until the buffer's previous piece is on the GPU
            into = self._buffers[piece.slot, : piece.size]
        content: Any = into.numpy()
        view = memoryview(content)
        try:
            with piece.stored.file.open("rb", buffering=0) as file:
                file.seek(piece.stored.start + piece.offset)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise _unreadable(piece.stored, tr("it ends too early"))
                    view = view[count:]
        except OSError as error:
            raise _unreadable(piece.stored, str(error)) from error

    def _copy(self, piece: _Piece, target: torch.Tensor) -> None:
        assert self._buffers is not None
        assert piece.slot is not None
        with torch.cuda.device(target.device):
            source = self._buffers[piece.slot, : piece.size]
            target[piece.offset : piece.offset + piece.size].copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._copied[piece.slot] = event


def _dtype(stored: StoredTensor) -> torch.dtype:
    if stored.dtype not in DTYPES:
        raise _unreadable(
            stored,
            tr(
                "{name} is stored as {dtype}; known are {dtypes}",
                name=stored.name,
                dtype=stored.dtype,
                dtypes=", ".join(DTYPES),
            ),
        )
    return DTYPES[stored.dtype]


def _unreadable(stored: StoredTensor, why: str) -> CheckpointError:
    return CheckpointError(
        tr("{file}: the weights cannot be read: {why}", file=stored.file, why=why),
        hint=tr("fetch the file again; if it lies on a network disk, check that"),
        code="checkpoint-read",
    )
