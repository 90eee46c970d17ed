"""Reading safetensors files in rows, so that no tensor, and certainly no shard, has to be in memory as a whole.

The format is a length, a JSON header and the payload; ``checkpoint.model_files`` checks the header, the rest is
seeking. Memory mapping would do the same, but its pages count as the process's own wherever memory is limited.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from cogtune.checkpoint.model_files import read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Number formats that arithmetic is done on; tensors of any other are only copied."""

CHUNK = 16 * 2**20
"""Bytes copied at a time."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``start`` and ``stop`` are bytes of the file."""

    name: str
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


class RawFile:
    """An open safetensors file.

    Raises:
        CheckpointError: not a safetensors file, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path = path
        self._stream: BinaryIO = path.open("rb", buffering=0)
        self.payload_start = 8 + int.from_bytes(self._stream.read(8), "little")
        self.entries: dict[str, Entry] = {
            name: Entry(
                name,
                item["dtype"],
                tuple(item["shape"]),
                self.payload_start + item["data_offsets"][0],
                self.payload_start + item["data_offsets"][1],
            )
            for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"])
        }

    def __enter__(self) -> RawFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def prefix(self) -> bytes:
        """Everything before the payload."""
        return self._bytes(0, self.payload_start)

    def chunks(self, entry: Entry) -> Iterator[bytes]:
        """A tensor's bytes, a piece at a time."""
        for start in range(entry.start, entry.stop, CHUNK):
            yield self._bytes(start, min(start + CHUNK, entry.stop))

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows ``first`` to ``last`` (exclusive) of a tensor, in its own number format: [rows, ...]."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        last = entry.rows if last is None else last
        row_bytes = entry.width * dtype.itemsize
        content = self._bytes(entry.start + first * row_bytes, entry.start + last * row_bytes)
        flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.reshape(last - first, *entry.shape[1:]) if entry.shape else flat.reshape(())

    def _bytes(self, start: int, stop: int) -> bytes:
        self._stream.seek(start)
        content = b""
        while len(content) < stop - start:
            piece = self._stream.read(stop - start - len(content))
            if not piece:
                raise EOFError(f"{self.path}: ended at byte {start + len(content)}, {stop} expected")
            content = piece if not content else content + piece
        return content
