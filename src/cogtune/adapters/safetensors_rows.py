"""Read safetensors files in rows, so that no whole tensor or shard has to be in memory.

The format is a length, a JSON header and the payload. ``checkpoint.model_files`` checks the header; the rest is
seeking. Memory mapping would work too, but its pages count towards the process's memory where memory is limited.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from cogtune.checkpoint.model_files import read_header
from cogtune.checkpoint.stream import DTYPES as STORED
from cogtune.checkpoint.stream import StoredTensor, find_stored
from cogtune.language import tr

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes that can be computed with; tensors of any other are only copied."""

CHUNK = 16 * 2**20
"""Bytes copied at a time."""


class SafetensorsFile:
    """An open safetensors file.

    Raises:
        CheckpointError: not a safetensors file, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in find_stored(path, read_header(path))}
        self._stream: BinaryIO = path.open("rb", buffering=0)
        self.payload_start = 8 + int.from_bytes(self._stream.read(8), "little")

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def prefix(self) -> bytes:
        """Return everything before the payload."""
        return self._bytes(0, self.payload_start)

    def chunks(self, tensor: StoredTensor) -> Iterator[bytes]:
        """Yield a tensor's bytes in chunks."""
        for start in range(tensor.start, tensor.stop, CHUNK):
            yield self._bytes(start, min(start + CHUNK, tensor.stop))

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return rows ``first`` to ``last`` (exclusive) of a tensor in its own dtype: [rows, ...]."""
        return read_rows(self._stream, self.tensors[name], first, last)

    def _bytes(self, start: int, stop: int) -> bytes:
        return _bytes(self._stream, self.path, start, stop)


def read_rows(stream: BinaryIO, tensor: StoredTensor, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Return rows ``first`` to ``last`` (exclusive) of a tensor in an open file, in its own dtype: [rows, ...]."""
    dtype = STORED[tensor.dtype]
    last = tensor.rows if last is None else last
    row_bytes = tensor.width * dtype.itemsize
    content = _bytes(stream, tensor.file, tensor.start + first * row_bytes, tensor.start + last * row_bytes)
    flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(last - first, *tensor.shape[1:]) if tensor.shape else flat.reshape(())


def _bytes(stream: BinaryIO, path: Path, start: int, stop: int) -> bytes:
    stream.seek(start)
    content = b""
    while len(content) < stop - start:
        piece = stream.read(stop - start - len(content))
        if not piece:
            raise EOFError(
                tr("{path}: ended at byte {start}, {stop} expected", path=path, start=start + len(content), stop=stop)
            )
        content = piece if not content else content + piece
    return content
